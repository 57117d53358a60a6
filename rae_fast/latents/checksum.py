"""CRC-32C of anything that has bytes."""

from __future__ import annotations

import numpy as np

from rae_fast.latents.gather import gather_or_none
from rae_fast.latents.storage import Storage

BLOCK_BYTES = 1 << 24


def crc32c(data: bytes | bytearray | memoryview | np.ndarray, start: int = 0) -> int:
    """CRC-32C of `data`, continuing from `start`; by gather.c where it can be had, by google-crc32c elsewhere."""
    if isinstance(data, np.ndarray):
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    else:
        flat = np.frombuffer(data, np.uint8)
    library = gather_or_none()
    if library is None:
        import google_crc32c

        return google_crc32c.extend(start, flat)
    return library.rae_crc32c(flat.ctypes.data, flat.nbytes, start)


def crc32c_file(storage: Storage, key: str) -> tuple[int, int]:
    """(size, CRC-32C) of a stored file, read in blocks.

    Raises:
        FileNotFoundError: there is no such key.
    """
    total, crc = 0, 0
    while True:
        block = storage.read(key, total, BLOCK_BYTES)
        crc = crc32c(block, crc)
        total += len(block)
        if len(block) < BLOCK_BYTES:
            return total, crc
