"""A look of a few microseconds at encoded bytes: may DALI have them, or does PIL have to try?

One bad image costs DALI its whole batch and the pipeline, so that nothing doubtful goes there.
"""

from __future__ import annotations

import threading
import zlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from io import BytesIO
from struct import error as StructError

import numpy as np
from PIL import Image

from rae_fast.images.entries import ReadError

# Far above this DALI holds too much memory per thread; PIL decodes one image at a time.
MAX_DALI_PIXELS = 20_000_000
END_OF_IMAGE = b"\xff\xd9"
TAIL_BYTES = 64 * 1024
JPEG_START = b"\xff\xd8\xff"
# Formats that data sets hold. Not all that PIL knows: it hands PostScript to an interpreter.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
# Large images take turns: at 100 megapixels each holds close to a gigabyte while it is converted.
LARGE = threading.Lock()
# What PIL's decoders raise on damaged bytes. Nothing else is caught: another exception is a fault of ours.
PIL_FAILURES = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    MemoryError,
    StructError,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def pixels_for_dali(data: bytes) -> int:
    """Pixels of a whole 8-bit gray or colour JPEG of sane size, which DALI decodes as PIL does; 0 for all else."""
    from nvidia import nvimgcodec

    if not data.startswith(JPEG_START) or data.rfind(END_OF_IMAGE, -TAIL_BYTES) < 0:
        return 0
    try:
        stream = nvimgcodec.CodeStream(data)
        pixels, channels = stream.height * stream.width, stream.num_channels
    except RuntimeError:
        return 0
    return pixels if pixels <= MAX_DALI_PIXELS and channels in (1, 3) else 0


def decode_pil(data: bytes) -> np.ndarray:
    """Decode any image that PIL reads, first frame, `convert("RGB")`, EXIF orientation ignored: uint8 [H, W, 3].

    Raises:
        ReadError: PIL cannot; the reason in one line.
    """
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image, _one_at_a_time(image.width * image.height):
            return np.asarray(image.convert("RGB"))
    except PIL_FAILURES as error:
        text = " ".join(str(error).split()) or type(error).__name__
        # PIL prints the address of the buffer, which says nothing.
        raise ReadError(text.split(" <_io.BytesIO")[0]) from error


def _one_at_a_time(pixels: int) -> AbstractContextManager:
    return LARGE if pixels > MAX_DALI_PIXELS else nullcontext()


@cache
def _formats() -> list[str]:
    """Those of our formats that this build of PIL reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
