"""Random rows of a store into a caller's buffer, each one checked against its checksum before it is served.

`gather` is one call per batch. All readers give the same bytes; they differ in speed only: `native_reader` is the fast
one for local stores, `portable_readers` has the others.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numcodecs import Zstd

from rae_fast.errors import UserError
from rae_fast.latents.layout import EMPTY, Plane
from rae_fast.latents.shard import read_index
from rae_fast.latents.store import bad_shard
from rae_fast.native import NativeUnavailableError

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

    def prefetch(self, rows: np.ndarray, planes: Sequence[Plane], which: np.ndarray) -> None:
        """Hint that these rows will be asked for soon; arguments as in `gather`."""


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


def check_rows(store: LatentStore, rows: np.ndarray) -> None:
    """Raises IndexError unless all rows exist."""
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= store.n):
        raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} of a store of {store.n}")


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


def allow_many_files() -> None:
    """A store of ImageNet has 1,250 shards; the usual soft limit of open files is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_reader(store: LatentStore, kind: str = "auto", *, verify: bool = True, in_blocks: bool = False) -> Reader:
    """The reader of that name (`loader.reader`), or the fastest that works here.

    Args:
        store: a complete store.
        kind: name of the reader, or "auto".
        verify: check each row's checksum.
        in_blocks: rows will be asked for block by block, which the page cache serves better than O_DIRECT.

    Raises:
        UserError: the kind is unknown, or cannot serve this store.
    """
    from rae_fast.latents import native_reader, portable_readers

    makers: dict[str, Callable[[], Reader]] = {
        "tensorstore": lambda: portable_readers.TensorstoreReader(store, verify),
        "zarr": lambda: portable_readers.ZarrReader(store, verify),
    }
    if store.storage.is_local:
        makers["native"] = lambda: native_reader.NativeReader(store, verify, "buffered" if in_blocks else None)
        makers["buffered"] = lambda: portable_readers.BufferedReader(store, verify)
    else:
        makers["object"] = lambda: portable_readers.ObjectReader(store, verify)
    if kind == "auto" and not store.storage.is_local:
        return makers["object"]()
    if kind == "auto":
        try:
            return makers["native"]()
        except NativeUnavailableError as error:
            native_reader.announce(str(error))
            return makers["buffered"]()
    if kind not in makers:
        raise UserError(f"loader.reader is {kind!r} for {store.url}", f"auto or one of {', '.join(makers)}")
    try:
        return makers[kind]()
    except NativeUnavailableError as error:
        raise UserError(f"loader.reader is native, but {error}", "a C compiler", "set loader.reader=auto") from error
