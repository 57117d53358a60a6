"""The fast reader of local stores: one call into C per batch, without the GIL, checksums included.

Three ways to the bytes: memory maps while the store fits in memory, O_DIRECT past the page cache when it does not, and
buffered reads where a file system has no O_DIRECT.

Shapes: B rows of a batch.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from rae_fast.latents.gather import gather_library
from rae_fast.latents.layout import Plane, shard_count
from rae_fast.latents.reader import RowTable, allow_many_files, check_rows, decompress
from rae_fast.latents.storage import LocalStorage
from rae_fast.latents.store import bad_shard

if TYPE_CHECKING:
    from rae_fast.latents.store import LatentStore

MAPPED, BUFFERED, DIRECT = 0, 1, 2
MODES = {"mapped": MAPPED, "buffered": BUFFERED, "direct": DIRECT}
CHECKSUM, CUT_SHORT = -1, -2
DIRECT_READS = 16  # in flight: what an NVMe disk wants
MEMORY_SHARE = 0.5  # of what is free: a store below this is expected to stay in the page cache
PAGE = 4096


def aligned_empty(shape: Sequence[int], dtype: str | np.dtype) -> np.ndarray:
    """An uninitialized array that begins on a page, so that O_DIRECT can read straight into it."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + size].view(dtype).reshape(shape)


class NativeReader:
    """Rows through `gather.c`.

    Args:
        store: a local store.
        verify: check each row's checksum.
        mode: "mapped", "direct", "buffered", or None: mapped if the store fits in memory.
        threads: that copy, or reads in flight; None: one per core up to four for copies, sixteen reads from the disk.

    Raises:
        NativeUnavailableError: there is no compiler, or it failed.
    """

    name = "native"

    def __init__(
        self, store: LatentStore, verify: bool = True, mode: str | None = None, threads: int | None = None
    ) -> None:
        assert isinstance(store.storage, LocalStorage)
        self.store, self.verify = store, verify
        self._library = gather_library()
        self._table = RowTable(store)
        self.mode = mode or ("mapped" if fits_in_memory(store) else "direct")
        cores = len(os.sched_getaffinity(0))
        self.threads = threads or (min(4, cores) if self.mode == "mapped" else DIRECT_READS)
        self._queue = self._library.rae_queue_open(self.threads) if self.mode == "direct" else None
        shards = shard_count(store.n, store.shard_size)
        self._shards = {name: np.full(shards, -1, np.int64) for name in store.planes}  # address or descriptor
        self._scales = {name: np.full(shards, -1, np.int64) for name in store.planes}
        self._crcs = {name: store.crcs(plane) for name, plane in store.planes.items()} if verify else {}
        self._touched = {name: np.zeros(store.n if self.mode == "mapped" else 0, bool) for name in store.planes}
        self._maps: list[tuple[mmap.mmap, np.ndarray]] = []
        self._files: list[int] = []
        allow_many_files()

    def gather(
        self, rows: np.ndarray, planes: Sequence[Plane], which: np.ndarray, out: np.ndarray, scales: np.ndarray | None
    ) -> None:
        check_rows(self.store, rows)
        assert out.flags.c_contiguous and (scales is None or scales.flags.c_contiguous)
        compressed = planes[0].compressed
        file, offset, size, crc = (np.zeros(len(rows), dtype) for dtype in ("i8", "i8", "i8", "u4"))
        scale_file, scale_offset = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        fresh = np.zeros(len(rows), bool)
        for number, plane in enumerate(planes):
            mine = np.flatnonzero(which == number)
            if len(mine):
                self._locate(plane, rows[mine], mine, file, offset, size)
                if self.mode == "mapped":
                    fresh[mine] = ~self._touched[plane.name][rows[mine]]
                    self._touched[plane.name][rows[mine]] = True
                if self.verify:
                    crc[mine] = self._crcs[plane.name][rows[mine]]
                if scales is not None:
                    self._locate_scales(plane, rows[mine], mine, scale_file, scale_offset)
        target = aligned_empty((len(rows), int(size.max(initial=0))), np.uint8) if compressed else out
        problem = np.zeros(1, np.int32)
        bad = self._library.rae_gather(
            len(rows), MODES[self.mode], self.threads, self._queue, self.verify, fresh.ctypes.data,
            file.ctypes.data, offset.ctypes.data, size.ctypes.data, crc.ctypes.data,
            target.ctypes.data, target.strides[0] if len(rows) else 0,
            scale_file.ctypes.data, scale_offset.ctypes.data, 0 if scales is None else planes[0].scale_bytes,
            None if scales is None else scales.ctypes.data, problem.ctypes.data,
        )  # fmt: skip
        if bad >= 0:
            self._refuse(planes[int(which[bad])], int(rows[bad]), int(problem[0]))
        if compressed:
            for i, row in enumerate(rows.tolist()):
                plane, shard = planes[int(which[i])], row // self.store.shard_size
                decompress(self.store, plane, shard, row, target[i, : size[i]], out[i].reshape(-1).view(np.uint8))

    def prefetch(self, rows: np.ndarray, planes: Sequence[Plane], which: np.ndarray) -> None:
        """Have the system read rows into the page cache, ahead and in the order of the disk; returns at once."""
        if self.mode != "buffered":
            return
        file, offset, size = (np.zeros(len(rows), np.int64) for _ in range(3))
        for number, plane in enumerate(planes):
            mine = np.flatnonzero(which == number)
            if len(mine):
                self._locate(plane, rows[mine], mine, file, offset, size)
        for i in np.lexsort((offset, file)).tolist():
            os.posix_fadvise(int(file[i]), int(offset[i]), int(size[i]), os.POSIX_FADV_WILLNEED)

    def _locate(
        self, plane: Plane, rows: np.ndarray, into: np.ndarray, file: np.ndarray, offset: np.ndarray, size: np.ndarray
    ) -> None:
        """Fill in where rows of one plane lie, opening shards that are met for the first time."""
        shard, slot = np.divmod(rows, self.store.shard_size)
        handles = self._shards[plane.name]
        for new in _unopened(handles, shard):
            handles[new] = self._open(plane, new)
        file[into] = handles[shard]
        if not plane.compressed:
            offset[into], size[into] = slot * plane.row_bytes, plane.row_bytes
            return
        for i, row in zip(into.tolist(), rows.tolist(), strict=True):
            _, offset[i], size[i] = self._table.locate(plane, row)

    def _locate_scales(
        self, plane: Plane, rows: np.ndarray, into: np.ndarray, file: np.ndarray, offset: np.ndarray
    ) -> None:
        shard, slot = np.divmod(rows, self.store.shard_size)
        handles = self._scales[plane.name]
        for new in _unopened(handles, shard):
            handles[new] = self._descriptor(plane, new, plane.scale_key(new), os.O_RDONLY)
        file[into], offset[into] = handles[shard], slot * plane.scale_bytes

    def _open(self, plane: Plane, shard: int) -> int:
        """Address of a mapped shard, or descriptor of an opened one."""
        key = plane.shard_key(shard)
        if self.mode == "direct":
            try:
                return self._descriptor(plane, shard, key, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.mode = "buffered"  # tmpfs and some network file systems have no O_DIRECT
        file = self._descriptor(plane, shard, key, os.O_RDONLY)
        if self.mode == "buffered":
            return file
        size = os.fstat(file).st_size
        checks = self.store.checks
        if checks is not None and size != checks[key][0]:
            # Touching a map beyond the end of its file would kill the process.
            raise bad_shard(self.store, plane, shard, f"{key} has {size} bytes instead of {checks[key][0]}")
        mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        os.close(self._files.pop())
        mapped.madvise(mmap.MADV_RANDOM)
        view = np.frombuffer(mapped, np.uint8)
        self._maps.append((mapped, view))
        return view.ctypes.data

    def _descriptor(self, plane: Plane, shard: int, key: str, flags: int) -> int:
        assert isinstance(self.store.storage, LocalStorage)
        try:
            self._files.append(os.open(self.store.storage.path(key), flags))
        except FileNotFoundError as error:
            raise bad_shard(self.store, plane, shard, f"{key} is missing") from error
        return self._files[-1]

    def _refuse(self, plane: Plane, row: int, problem: int) -> None:
        shard = row // self.store.shard_size
        if problem == CHECKSUM:
            raise bad_shard(self.store, plane, shard, f"row {row} fails its checksum")
        if problem == CUT_SHORT:
            raise bad_shard(self.store, plane, shard, f"row {row} is cut short")
        raise OSError(max(problem, 0) or errno.ENOMEM, f"row {row} of {plane.array} in {self.store.url}")

    def __del__(self) -> None:
        if getattr(self, "_queue", None):
            self._library.rae_queue_close(self._queue)
        for file in getattr(self, "_files", ()):
            os.close(file)


def _unopened(handles: np.ndarray, shards: np.ndarray) -> list[int]:
    """Which of these shards have no handle yet, each once.

    By a set: numpy's sort gives up the GIL whatever the size, and beside a busy thread waits 5 ms to have it back.
    """
    return sorted(set(shards[handles[shards] < 0].tolist()))


def fits_in_memory(store: LatentStore) -> bool:
    """Whether the page cache can be expected to hold the whole store."""
    assert store.checks is not None
    return sum(size for size, _ in store.checks.values()) < MEMORY_SHARE * available_memory_bytes()


def available_memory_bytes() -> int:
    """Memory that this process may still fill, its control group's limit included."""
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    return int(free)


@cache
def announce(reason: str) -> None:
    """Say, once, that the native reader cannot be had."""
    print(f"latents are read through Python, about half as fast: {reason}", flush=True)
