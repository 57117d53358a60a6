"""JPEG decoding, by DALI on the CPU and by nvJPEG. Imports of both happen inside the probes."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

from rae_fast.doctor.trial import CACHE, DEMO, MISSING, OK, SLOW, Trial

JPEGS, JPEG_SIZE = 48, (500, 375)
SLOW_DECODE = 60  # images/s a core


def probe_dali() -> Trial:
    """DALI on the CPU: JPEGs of 500 x 375."""
    return _decode("DALI", None)


def probe_nvjpeg() -> Trial:
    """nvJPEG through DALI on the GPU."""
    if not gpu_count():
        return Trial("nvJPEG", MISSING, "no GPU", "data.crop=fast decodes on the CPU, as exact does")
    return _decode("nvJPEG", 0)


def _decode(name: str, device: int | None) -> Trial:
    try:
        import nvidia.dali  # noqa: F401 - whether it can be loaded
    except ImportError as error:
        mend = "pip install nvidia-dali-cuda130 (or -cuda120 for an older driver)"
        return Trial(name, MISSING, str(error), "no store can be built", mend, (DEMO, CACHE))
    from rae_fast.images.dali import DaliDecoder

    jpegs, threads = _jpegs(), len(os.sched_getaffinity(0))
    try:
        decoder = DaliDecoder(len(jpegs), threads, device)
        seconds = [_decode_once(decoder, jpegs) for _ in range(3)]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        cost, stops = ("no store can be built", (DEMO, CACHE)) if device is None else ("data.crop=fast fails", ())
        return Trial(name, MISSING, reason, cost, "pip install a DALI that fits the driver", stops)
    rate = len(jpegs) / min(seconds)
    version = next((v for d in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if (v := _version(d))), "")
    found = f"{version} decodes {rate:,.0f} images/s on {'the GPU' if device is not None else f'{threads} cores'}"
    if rate < SLOW_DECODE * threads:
        return Trial(name, SLOW, found, f"ImageNet decodes in {1_281_167 / rate / 3600:.1f} h", "give it idle cores")
    return Trial(name, OK, found)


def _decode_once(decoder: Any, jpegs: list[bytes]) -> float:
    started_s = time.monotonic()
    decoder.submit(jpegs)
    assert len(decoder.result()) == len(jpegs)
    return time.monotonic() - started_s


def gpu_count() -> int:
    """NVIDIA GPUs that the driver offers, asked without any library that would have to be loaded."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return 0
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _jpegs() -> list[bytes]:
    """Blurred noise, which compresses about as photographs do."""
    import io

    import numpy as np
    from PIL import Image

    files = []
    for seed in range(JPEGS):
        coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files
