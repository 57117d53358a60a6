"""Carries out crop plans on the CPU: by the native loops of resample.c where a C compiler is found, by PIL elsewhere.

Both give the same bytes; the native loops take a sixth of PIL's time and, like PIL, run beside Python.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rae_fast.images.crop import BICUBIC, BOX, CropPlan, center_plan, crop_exact, crop_pil
from rae_fast.native import NativeUnavailableError, load_library

SOURCE = Path(__file__).with_name("resample.c")
# No contraction of floating-point expressions: fused multiply-adds would round some taps differently from PIL.
FLAGS = ("-O3", "-march=native", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared", "-lm")
FILTER_CODES = {BOX: 0, BICUBIC: 1}


def crop_into(image_HW3: np.ndarray, plan: CropPlan, out_3SS: np.ndarray) -> None:
    """Carry out a plan: uint8 [H, W, 3] (contiguous) into uint8 [3, S, S] (contiguous), PIL's bytes."""
    library = native_or_none()
    if library is None:
        out_3SS[...] = np.asarray(crop_pil(Image.fromarray(image_HW3), plan)).transpose(2, 0, 1)
    else:
        _crop_native(library, image_HW3, plan, out_3SS)


@cache
def native_or_none() -> ctypes.CDLL | None:
    """The native resampler; None, said once, where there is none."""
    try:
        return load_native()
    except NativeUnavailableError as error:
        warnings.warn(f"crops are made by PIL, about six times slower: {error}", stacklevel=2)
        return None


def load_native() -> ctypes.CDLL:
    """resample.c, compiled, and checked against plain arithmetic.

    Raises:
        NativeUnavailableError: no compiler, it failed, or the result is wrong.
    """
    library = load_library(SOURCE, FLAGS)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.rae_crop.argtypes = (pointer, number, number, pointer, number, number, number, number, pointer)
    library.rae_crop.restype = number
    _check(library)
    return library


def _check(library: ctypes.CDLL) -> None:
    """Refuse a library whose bytes differ from the plain arithmetic's: a compiler or a machine may be broken."""
    noise = np.random.default_rng(0)
    for height, width in ((75, 53), (40, 131)):
        image_HW3 = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        plan = center_plan(width, height, 16)
        out_3SS = np.empty((3, 16, 16), np.uint8)
        _crop_native(library, image_HW3, plan, out_3SS)
        if not torch.from_numpy(out_3SS).equal(crop_exact(torch.from_numpy(image_HW3), plan)):
            raise NativeUnavailableError("the compiled resampler gives wrong bytes")


def _crop_native(library: ctypes.CDLL, image_HW3: np.ndarray, plan: CropPlan, out_3SS: np.ndarray) -> None:
    assert image_HW3.flags.c_contiguous and out_3SS.flags.c_contiguous
    height, width, channels = image_HW3.shape
    assert channels == 3 and out_3SS.shape == (3, plan.size, plan.size)
    resizes = _as_ints(plan)
    done = library.rae_crop(
        image_HW3.ctypes.data, width, height, resizes, len(plan.resizes), plan.left, plan.top, plan.size,
        out_3SS.ctypes.data,
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory to crop an image of {width} x {height} pixels")


@lru_cache(maxsize=1024)
def _as_ints(plan: CropPlan) -> ctypes.Array:
    numbers = [n for r in plan.resizes for n in (r.width, r.height, FILTER_CODES[r.filter], r.vertical_first)]
    return (ctypes.c_int * len(numbers))(*numbers)
