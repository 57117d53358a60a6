"""One shard file of a zarr v3 array: rows end to end, then the index with its checksum, written once, in one stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numcodecs import Zstd

from rae_fast.latents.checksum import crc32c
from rae_fast.latents.codecs import ZSTD_LEVEL
from rae_fast.latents.layout import INDEX_ENTRY, Plane, index_bytes, shard_index
from rae_fast.latents.storage import Storage


@dataclass
class ShardFile:
    """A shard that is being written.

    Attributes:
        plane: which array it belongs to.
        row_crcs: CRC-32C of each row's stored bytes and scales so far.
        size, crc: of the file so far.
        scales: float16 rows of scales so far, each [C].
    """

    plane: Plane
    shard_size: int
    _file: IO[bytes]
    row_sizes: list[int] = field(default_factory=list)
    row_crcs: list[int] = field(default_factory=list)
    scales: list[np.ndarray] = field(default_factory=list)
    size: int = 0
    crc: int = 0

    def append(self, rows: np.ndarray, scales: np.ndarray | None = None) -> None:
        """Append rows [B, ...] of the plane's dtype, with their scales float16 [B, C] where the plane has them."""
        assert rows.shape[1:] == self.plane.row_shape and rows.dtype == self.plane.dtype
        compressor = Zstd(level=ZSTD_LEVEL, checksum=True) if self.plane.compressed else None
        rows = np.ascontiguousarray(rows)
        for i, row in enumerate(rows):
            payload = np.frombuffer(compressor.encode(row), np.uint8) if compressor else row.reshape(-1).view(np.uint8)
            self.append_payload(payload, None if scales is None else scales[i])

    def append_payload(self, payload: np.ndarray, scale: np.ndarray | None = None) -> None:
        """Append one row as it is stored: uint8 [nbytes], and its scales float16 [C]."""
        crc = crc32c(payload)
        if scale is not None:
            crc = crc32c(scale, crc)
            self.scales.append(scale)
        self.row_crcs.append(crc)
        self.row_sizes.append(payload.nbytes)
        self._write(payload)

    def _write(self, data: np.ndarray) -> None:
        self._file.write(data.data)
        self.crc = crc32c(data, self.crc)
        self.size += data.nbytes

    def _finish(self) -> None:
        index = shard_index(self.row_sizes, self.shard_size).view(np.uint8)
        self._write(index)
        self._write(np.array([crc32c(index)], "<u4").view(np.uint8))


@contextmanager
def write_shard(storage: Storage, plane: Plane, shard: int, shard_size: int) -> Iterator[ShardFile]:
    """A shard that takes its place, and its scales theirs, when the block ends without an exception."""
    with storage.create(plane.shard_key(shard)) as file:
        writing = ShardFile(plane, shard_size, file)
        yield writing
        writing._finish()
    if plane.scale_array:
        storage.write(plane.scale_key(shard), scale_chunk(writing.scales, shard_size).tobytes())


def scale_chunk(scales: Sequence[np.ndarray], shard_size: int) -> np.ndarray:
    """Scales of a shard as a whole chunk: float16 [shard_size, C], zero where there is no row."""
    chunk = np.zeros((shard_size, len(scales[0])), np.float16)
    chunk[: len(scales)] = scales
    return chunk


def read_index(storage: Storage, plane: Plane, shard: int, shard_size: int) -> np.ndarray:
    """A shard's index: structured array [shard_size] of `offset` and `nbytes`.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is cut short, or the index does not match its checksum.
    """
    key = plane.shard_key(shard)
    size = storage.size(key)
    if size is None:
        raise FileNotFoundError(key)
    length = index_bytes(shard_size)
    if size < length:
        raise ValueError(f"{key} has {size} bytes, fewer than its index")
    raw = storage.read(key, size - length, length)
    if crc32c(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        raise ValueError(f"the index of {key} does not match its checksum")
    return np.frombuffer(raw[:-4], INDEX_ENTRY)
