"""Random rows of a store into a caller's buffer, each one checked against its checksum before it is served.

`gather` is one call per batch. All readers give the same bytes; they differ in speed only.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numcodecs import Zstd

from rae_fast.errors import UserError
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.layout import EMPTY, Plane
from rae_fast.latents.shard import read_index
from rae_fast.latents.storage import LocalStorage, ObjectStorage

if TYPE_CHECKING:
    from rae_fast.latents.store import LatentStore


class Reader(Protocol):
    """Copies rows out of a store."""

    name: str

    def gather(
        self,
        rows: np.ndarray,
        planes: Sequence[Plane],
        which: np.ndarray,
        out: np.ndarray,
        scales: np.ndarray | None,
    ) -> None:
        """Copy row rows[i] of planes[which[i]] to out[i], and its scales to scales[i].

        Args:
            rows: int64 [B].
            planes: planes of equal row shape and dtype.
            which: int64 [B].
            out: [B, *row_shape] of the planes' dtype, contiguous.
            scales: float16 [B, C], contiguous, or None where the planes have none.

        Raises:
            UserError: a row is not what was written; nothing of this batch may be used.
            IndexError: a row lies outside of the store.
        """


class RowTable:
    """Where each row lies: shard indices are read when first asked for and kept, 16 bytes a row."""

    def __init__(self, store: LatentStore) -> None:
        self.store = store
        self._indices: dict[tuple[str, int], np.ndarray] = {}

    def locate(self, plane: Plane, row: int) -> tuple[int, int, int]:
        """(shard, offset, size in bytes) of a row's stored form.

        Raises:
            UserError: its shard is missing or damaged.
        """
        shard, slot = divmod(row, self.store.shard_size)
        if not plane.compressed:
            # Rows of one size lie end to end: nothing to look up.
            return shard, slot * plane.row_bytes, plane.row_bytes
        index = self._indices.get((plane.name, shard))
        if index is None:
            try:
                index = read_index(self.store.storage, plane, shard, self.store.shard_size)
            except (FileNotFoundError, ValueError) as error:
                raise bad_shard(self.store, plane, shard, str(error)) from error
            self._indices[plane.name, shard] = index
        offset, size = (int(word) for word in index[slot])
        if EMPTY in (offset, size):
            raise bad_shard(self.store, plane, shard, f"row {row} is missing from its index")
        return shard, offset, size


def bad_shard(store: LatentStore, plane: Plane, shard: int, what: str) -> UserError:
    """The error for a shard that cannot be trusted."""
    return UserError(
        f"{store.url}: shard {shard} of {plane.array}: {what}",
        "the bytes that were written",
        f"run tools/inspect_cache.py repair {store.url}",
    )


def check_rows(store: LatentStore, rows: np.ndarray) -> None:
    """Raises IndexError unless all rows exist."""
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= store.n):
        raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} of a store of {store.n}")


class BufferedReader:
    """One read per row through the page cache, in Python; local stores only."""

    name = "buffered"

    def __init__(self, store: LatentStore, verify: bool = True) -> None:
        assert isinstance(store.storage, LocalStorage)
        self.store, self.verify = store, verify
        self._table = RowTable(store)
        self._crcs: dict[str, np.ndarray] = {}
        self._files: dict[str, int] = {}
        _allow_many_files()

    def gather(
        self, rows: np.ndarray, planes: Sequence[Plane], which: np.ndarray, out: np.ndarray, scales: np.ndarray | None
    ) -> None:
        check_rows(self.store, rows)
        for i, (row, plane_number) in enumerate(zip(rows.tolist(), which.tolist(), strict=True)):
            plane = planes[plane_number]
            crc = self._read(plane, row, out[i].reshape(-1).view(np.uint8), None if scales is None else scales[i])
            if self.verify and crc != self._crc(plane, row):
                raise bad_shard(self.store, plane, row // self.store.shard_size, f"row {row} fails its checksum")

    def _read(self, plane: Plane, row: int, out: np.ndarray, scale: np.ndarray | None) -> int:
        """Read one row and its scales; returns the checksum of what was read, 0 if nobody wants to know."""
        shard, offset, size = self._table.locate(plane, row)
        stored = np.empty(size, np.uint8) if plane.compressed else out
        self._pread(plane, shard, plane.shard_key(shard), stored, offset)
        crc = crc32c(stored) if self.verify else 0
        if plane.compressed:
            decompress(self.store, plane, shard, row, stored, out)
        if scale is not None:
            slot = row % self.store.shard_size
            self._pread(plane, shard, plane.scale_key(shard), scale.view(np.uint8), slot * plane.scale_bytes)
            crc = crc32c(scale, crc) if self.verify else 0
        return crc

    def _pread(self, plane: Plane, shard: int, key: str, out: np.ndarray, offset: int) -> None:
        file = self._files.get(key)
        if file is None:
            assert isinstance(self.store.storage, LocalStorage)
            try:
                file = self._files[key] = os.open(self.store.storage.path(key), os.O_RDONLY)
            except FileNotFoundError as error:
                raise bad_shard(self.store, plane, shard, f"{key} is missing") from error
        if os.preadv(file, [out], offset) != len(out):
            raise bad_shard(self.store, plane, shard, f"{key} is cut short")

    def _crc(self, plane: Plane, row: int) -> int:
        crcs = self._crcs.get(plane.name)
        if crcs is None:
            crcs = self._crcs[plane.name] = self.store.crcs(plane)
        return int(crcs[row])

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def decompress(store: LatentStore, plane: Plane, shard: int, row: int, stored: np.ndarray, out: np.ndarray) -> None:
    """Decode a zstd frame into `out`.

    Raises:
        UserError: it is not a frame, or not of the right size.
    """
    try:
        decoded = np.frombuffer(Zstd().decode(stored), np.uint8)
    except (RuntimeError, ValueError) as error:
        raise bad_shard(store, plane, shard, f"row {row} cannot be decompressed") from error
    if decoded.nbytes != out.nbytes:
        raise bad_shard(store, plane, shard, f"row {row} has {decoded.nbytes} bytes")
    out[:] = decoded


def _allow_many_files() -> None:
    """A store of ImageNet has 1,250 shards; the usual soft limit of open files is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class ObjectReader:
    """Concurrent range reads of an object store."""

    name = "object"

    def __init__(self, store: LatentStore, verify: bool = True) -> None:
        assert isinstance(store.storage, ObjectStorage)
        self.store, self.verify = store, verify
        self._table = RowTable(store)
        self._crcs: dict[str, np.ndarray] = {}

    def gather(
        self, rows: np.ndarray, planes: Sequence[Plane], which: np.ndarray, out: np.ndarray, scales: np.ndarray | None
    ) -> None:
        check_rows(self.store, rows)
        chosen = [(planes[p], row) for row, p in zip(rows.tolist(), which.tolist(), strict=True)]
        places = [self._table.locate(plane, row) for plane, row in chosen]
        keys = [plane.shard_key(place[0]) for (plane, _), place in zip(chosen, places, strict=True)]
        starts, sizes = [place[1] for place in places], [place[2] for place in places]
        if scales is not None:
            keys += [plane.scale_key(place[0]) for (plane, _), place in zip(chosen, places, strict=True)]
            starts += [row % self.store.shard_size * plane.scale_bytes for plane, row in chosen]
            sizes += [plane.scale_bytes for plane, _ in chosen]
        storage = self.store.storage
        assert isinstance(storage, ObjectStorage)
        try:
            parts = [np.frombuffer(part, np.uint8) for part in storage.read_ranges(keys, starts, sizes)]
        except FileNotFoundError as error:
            raise bad_shard(self.store, planes[0], places[0][0], f"{error} is missing") from error
        for i, (plane, row) in enumerate(chosen):
            self._place(plane, row, parts[i], parts[len(rows) + i] if scales is not None else None, out[i])
            if scales is not None:
                scales[i] = parts[len(rows) + i].view(np.float16)

    def _place(self, plane: Plane, row: int, stored: np.ndarray, scale: np.ndarray | None, out: np.ndarray) -> None:
        shard = row // self.store.shard_size
        if self.verify:
            crc = crc32c(stored) if scale is None else crc32c(scale, crc32c(stored))
            if plane.name not in self._crcs:
                self._crcs[plane.name] = self.store.crcs(plane)
            if crc != int(self._crcs[plane.name][row]):
                raise bad_shard(self.store, plane, shard, f"row {row} fails its checksum")
        flat = out.reshape(-1).view(np.uint8)
        if plane.compressed:
            decompress(self.store, plane, shard, row, stored, flat)
        elif stored.nbytes != flat.nbytes:
            raise bad_shard(self.store, plane, shard, f"row {row} is cut short")
        else:
            flat[:] = stored


READERS: dict[str, Callable[..., Reader]] = {"buffered": BufferedReader, "object": ObjectReader}


def open_reader(store: LatentStore, kind: str = "auto", *, verify: bool = True) -> Reader:
    """The reader of that name (`loader.reader`), or the fastest that works here.

    Raises:
        UserError: the kind is unknown, or cannot serve this store.
    """
    if kind == "auto":
        kind = "buffered" if store.storage.is_local else "object"
    if kind not in READERS:
        raise UserError(f"loader.reader is {kind!r}", f"auto or one of {', '.join(READERS)}")
    return READERS[kind](store, verify)
