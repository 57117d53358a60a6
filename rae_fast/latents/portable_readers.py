"""Readers that need nothing compiled here: plain reads, range reads of object stores, tensorstore, zarr-python.

Shapes: B rows of a batch, C channels.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rae_fast.latents.checksum import crc32c
from rae_fast.latents.layout import Plane
from rae_fast.latents.reader import RowTable, allow_many_files, check_rows, decompress
from rae_fast.latents.storage import LocalStorage, ObjectStorage
from rae_fast.latents.store import bad_shard, damaged

if TYPE_CHECKING:
    from rae_fast.latents.store import LatentStore


class _Portable:
    """What these readers have in common: they leave reading ahead to the system."""

    def prefetch(self, rows: np.ndarray, planes: Sequence[Plane], which: np.ndarray) -> None:
        """Nothing to do."""


class BufferedReader(_Portable):
    """One read per row through the page cache, in Python; local stores only."""

    name = "buffered"

    def __init__(self, store: LatentStore, verify: bool = True) -> None:
        assert isinstance(store.storage, LocalStorage)
        self.store, self.verify = store, verify
        self._table = RowTable(store)
        self._crcs: dict[str, np.ndarray] = {}
        self._files: dict[str, int] = {}
        allow_many_files()

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


class ObjectReader(_Portable):
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


class _ArrayReader(_Portable, ABC):
    """Rows through a zarr library, which undoes the codecs; rows of raw bytes are checked here, zstd frames there."""

    def __init__(self, store: LatentStore, verify: bool = True) -> None:
        self.store, self.verify = store, verify
        self._arrays: dict[str, Any] = {}
        self._crcs: dict[str, np.ndarray] = {}
        self._whole: set[str] = set()

    def gather(
        self, rows: np.ndarray, planes: Sequence[Plane], which: np.ndarray, out: np.ndarray, scales: np.ndarray | None
    ) -> None:
        check_rows(self.store, rows)
        for number, plane in enumerate(planes):
            mine = np.flatnonzero(which == number)
            if not len(mine):
                continue
            shards = np.unique(rows[mine] // self.store.shard_size).tolist()
            for shard in shards:
                self._require(plane, shard)
            try:
                self._fetch(self._array(plane.array), rows[mine], out, mine)
                if scales is not None and plane.scale_array:
                    self._fetch(self._array(plane.scale_array), rows[mine], scales, mine)
            except (ValueError, RuntimeError, FileNotFoundError) as error:
                named = f"one of the shards {', '.join(map(str, shards))} of {plane.array}"
                raise damaged(self.store.storage, f"{named} cannot be read: {str(error).splitlines()[0]}") from error
            if self.verify and not plane.compressed:
                self._verify(plane, rows[mine], mine, out, scales)

    def _require(self, plane: Plane, shard: int) -> None:
        """Zarr libraries read a missing shard as zeros: look for it, once."""
        key = plane.shard_key(shard)
        if key not in self._whole:
            if self.store.storage.size(key) is None:
                raise bad_shard(self.store, plane, shard, f"{key} is missing")
            self._whole.add(key)

    def _verify(
        self, plane: Plane, rows: np.ndarray, mine: np.ndarray, out: np.ndarray, scales: np.ndarray | None
    ) -> None:
        if plane.name not in self._crcs:
            self._crcs[plane.name] = self.store.crcs(plane)
        for i, row in zip(mine.tolist(), rows.tolist(), strict=True):
            crc = crc32c(out[i])
            if scales is not None:
                crc = crc32c(scales[i], crc)
            if crc != int(self._crcs[plane.name][row]):
                raise bad_shard(self.store, plane, row // self.store.shard_size, f"row {row} fails its checksum")

    def _array(self, key: str) -> Any:
        if key not in self._arrays:
            self._arrays[key] = self._open(key)
        return self._arrays[key]

    @abstractmethod
    def _open(self, key: str) -> Any:
        """The array of that key, however the library holds it."""

    @abstractmethod
    def _fetch(self, array: Any, rows: np.ndarray, out: np.ndarray, into: np.ndarray) -> None:
        """Copy rows of an array to out[into]."""


class TensorstoreReader(_ArrayReader):
    """tensorstore, concurrently and without the GIL; local folders and the object stores that it knows."""

    name = "tensorstore"

    def _open(self, key: str) -> Any:
        import tensorstore

        # Without a cache: rows are read once an epoch, and memory stays bounded.
        context = {"cache_pool": {"total_bytes_limit": 0}}
        spec = {"driver": "zarr3", "kvstore": kvstore_spec(f"{self.store.url}/{key}"), "context": context}
        return tensorstore.open(spec, read=True).result()

    def _fetch(self, array: Any, rows: np.ndarray, out: np.ndarray, into: np.ndarray) -> None:
        import tensorstore

        contiguous = len(into) == len(out)
        target = out if contiguous else np.empty((len(into), *out.shape[1:]), out.dtype)
        tensorstore.array(target).write(array[rows.tolist()]).result()
        if not contiguous:
            out[into] = target


def kvstore_spec(url: str) -> Any:
    """What tensorstore calls a folder or a prefix of an object store.

    It does not know AWS_ENDPOINT_URL, by which everybody else finds S3-compatible servers other than Amazon's: without
    it, it would ask Amazon, and wait.
    """
    if "://" not in url:
        return {"driver": "file", "path": str(Path(url).absolute())}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url.startswith("s3://") or not endpoint:
        return f"{url}/"
    bucket, _, path = url.removeprefix("s3://").partition("/")
    return {"driver": "s3", "bucket": bucket, "path": f"{path}/", "endpoint": endpoint}


class ZarrReader(_ArrayReader):
    """zarr-python, a row at a time: its fancy indexing of sharded arrays is an order of magnitude slower."""

    name = "zarr"

    def _open(self, key: str) -> Any:
        import zarr

        return zarr.open_array(self.store.url, path=key, mode="r")

    def _fetch(self, array: Any, rows: np.ndarray, out: np.ndarray, into: np.ndarray) -> None:
        for i, row in zip(into.tolist(), rows.tolist(), strict=True):
            out[i] = array[row]
