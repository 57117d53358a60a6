"""gather.c as Python sees it: rows of shards into a buffer, and a fast CRC-32C."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from rae_fast.native import NativeUnavailableError, load_library

SOURCE = Path(__file__).with_name("gather.c")


@cache
def gather_library() -> ctypes.CDLL:
    """gather.c, compiled and declared.

    Raises:
        NativeUnavailableError: there is no compiler, or it failed.
    """
    library = load_library(SOURCE)
    i32, i64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.rae_gather.argtypes = (
        (i64, i32, i32, pointer, i32, *(pointer,) * 6, i64, *(pointer,) * 2, i64, pointer, pointer)
    )  # fmt: skip
    library.rae_gather.restype = i64
    library.rae_queue_open.argtypes, library.rae_queue_open.restype = (i32,), pointer
    library.rae_queue_close.argtypes, library.rae_queue_close.restype = (pointer,), None
    library.rae_crc32c.argtypes = (pointer, i64, ctypes.c_uint32)
    library.rae_crc32c.restype = ctypes.c_uint32
    return library


@cache
def gather_or_none() -> ctypes.CDLL | None:
    """The library; None where there is no compiler."""
    try:
        return gather_library()
    except NativeUnavailableError:
        return None
