"""Carries out crop plans on the CPU: by the native loops of resample.c where a C compiler is found, by PIL elsewhere.

Both give the same bytes; the native loops take a sixth of PIL's time and, like PIL, run beside Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rae_fast.images.crop import BICUBIC, BOX, CropPlan, center_plan, crop_exact, crop_pil
from rae_fast.provenance import atomic_write

SOURCE = Path(__file__).with_name("resample.c")
# No contraction of floating-point expressions: fused multiply-adds would round some taps differently from PIL.
FLAGS = ("-O3", "-march=native", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared")
FILTER_CODES = {BOX: 0, BICUBIC: 1}
COMPILE_TIMEOUT_S = 120


class NativeUnavailableError(RuntimeError):
    """The native resampler cannot be had; the reason."""


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
    """Compile resample.c, unless this machine has done so before, load it, and check it against plain arithmetic.

    Raises:
        NativeUnavailableError: no compiler, it failed, or the result is wrong.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _cpu())).encode()).hexdigest()[:16]
    path = _cache_folder() / f"resample-{key}.so"
    if not path.exists():
        _compile(compiler, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.rae_crop.argtypes = (pointer, number, number, pointer, number, number, number, number, pointer)
    library.rae_crop.restype = number
    _check(library)
    return library


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / path.name
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        except FileNotFoundError as error:
            raise NativeUnavailableError(f"no C compiler ({compiler[0]}); install gcc or set CC") from error
        except subprocess.CalledProcessError as error:
            complaint = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[-200:])
            raise NativeUnavailableError(f"{compiler[0]} failed: {complaint.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailableError(f"{compiler[0]} took more than {COMPILE_TIMEOUT_S} s") from error
        with atomic_write(path) as file:
            file.write(built.read_bytes())


def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    flags = [platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join(flags)


def _cache_folder() -> Path:
    """A folder of this user's own for compiled code, in the cache or, where that cannot be written, a temporary one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rae_fast"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="rae_fast-"))


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
