from __future__ import annotations

import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from rae_fast.errors import UserError
from rae_fast.latents import native_reader
from rae_fast.latents.gather import gather_library
from rae_fast.latents.native_reader import NativeReader, aligned_empty
from rae_fast.latents.reader import open_reader
from rae_fast.latents.store import LatentStore, open_store
from rae_fast.native import NativeUnavailableError

READERS = ("native", "buffered", "tensorstore", "zarr")
STORES = ("pristine_store", "balanced_store", "compact_store")
ROWS = np.array([40, 0, 7, 8, 8, 13, 31, 2])
WHICH = np.array([0, 1, 0, 1, 0, 0, 1, 1])


def gather(store: LatentStore, reader: Any, rows: np.ndarray = ROWS, which: np.ndarray = WHICH) -> tuple[Any, Any]:
    planes = [store.planes[view] for view in store.views]
    out = aligned_empty((len(rows), *planes[0].row_shape), planes[0].dtype)
    scales = np.empty((len(rows), planes[0].row_shape[0]), np.float16) if planes[0].scale_array else None
    reader.gather(rows, planes, which, out, scales)
    return out, scales


@pytest.fixture(params=STORES)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_gives_the_bytes_that_zarr_python_gives(path: Path, kind: str) -> None:
    store = open_store(path)
    group = zarr.open_group(path, mode="r")
    expected = [group[f"latents/{view}"][:] for view in store.views]
    out, scales = gather(store, open_reader(store, kind))
    for i, (row, view) in enumerate(zip(ROWS, WHICH, strict=True)):
        assert np.array_equal(out[i], expected[view][row])
        if scales is not None:
            assert np.array_equal(scales[i], group[f"scale/{store.views[view]}"][row])


@pytest.mark.parametrize("mode", ["mapped", "buffered", "direct"])
@pytest.mark.parametrize("threads", [1, 5])
def test_native_modes_agree(path: Path, mode: str, threads: int) -> None:
    store = open_store(path)
    expected, _ = gather(store, open_reader(store, "zarr"))
    got, _ = gather(store, NativeReader(store, mode=mode, threads=threads))
    assert np.array_equal(got, expected)


def test_direct_reads_of_pages_and_of_odd_pieces_agree(pristine_store: Path) -> None:
    """Pixel rows of 3 KiB straddle pages: read through a scratch buffer; buffers off a page likewise."""
    store = open_store(pristine_store)
    plane = store.planes["pixels"]
    rows = np.arange(store.n)
    expected = zarr.open_group(pristine_store, mode="r")["pixels"][:]
    out = np.empty(store.n * plane.row_bytes + 1, np.uint8)[1:].reshape(store.n, *plane.row_shape)
    for threads in (1, 5):
        out[:] = 0
        NativeReader(store, mode="direct", threads=threads).gather(rows, [plane], np.zeros_like(rows), out, None)
        assert np.array_equal(out, expected)


def copy_with_a_flipped_bit(path: Path, to: Path, shard: str) -> LatentStore:
    shutil.copytree(path, to)
    data = bytearray((to / shard).read_bytes())
    data[30] ^= 4
    (to / shard).write_bytes(data)
    return open_store(to)


def many(store: LatentStore) -> tuple[np.ndarray, np.ndarray]:
    """Far more rows than reads that may be in flight, and their views."""
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(store.n), 5))
    return rows, rows % 2


def test_direct_reads_without_a_queue_and_in_a_forked_child(path: Path) -> None:
    """A queue belongs to the process that opened it, and some systems have none: threads read instead."""
    store = open_store(path)
    expected, _ = gather(store, open_reader(store, "zarr"), *many(store))
    reader = NativeReader(store, mode="direct")
    assert np.array_equal(gather(store, reader, *many(store))[0], expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(gather(store, reader, *many(store))[0], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(gather(store, reader, *many(store))[0], expected)
    queue, reader._queue = reader._queue, None
    assert np.array_equal(gather(store, reader, *many(store))[0], expected)
    reader._queue = queue


def test_threads_may_share_a_direct_reader(path: Path) -> None:
    store = open_store(path)
    expected, _ = gather(store, open_reader(store, "zarr"), *many(store))
    reader = NativeReader(store, mode="direct")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: gather(store, reader, *many(store))[0], range(12)))
    assert all(np.array_equal(got, expected) for got in found)


def test_direct_reads_go_on_behind_a_bad_row(pristine_store: Path, tmp_path: Path) -> None:
    store = copy_with_a_flipped_bit(pristine_store, tmp_path / "store", "latents/original/c/1/0/0/0")
    reader = NativeReader(store, mode="direct")
    for _ in range(3):
        with pytest.raises(UserError, match="row 8 fails its checksum"):
            gather(store, reader, *many(store))
    whole = np.flatnonzero(np.arange(store.n) // store.shard_size != 1)
    expected, _ = gather(store, open_reader(store, "zarr"), whole, np.zeros_like(whole))
    assert np.array_equal(gather(store, reader, whole, np.zeros_like(whole))[0], expected)


@pytest.mark.parametrize("kind", READERS)
def test_no_reader_serves_a_flipped_bit(path: Path, kind: str, tmp_path: Path) -> None:
    store = copy_with_a_flipped_bit(path, tmp_path / "store", "latents/hflip/c/1/0/0/0")
    with pytest.raises(UserError, match=r"shards? .*1.* of latents/hflip.*repair"):
        gather(store, open_reader(store, kind))


@pytest.mark.parametrize("kind", READERS)
def test_no_reader_serves_a_missing_or_short_shard(path: Path, kind: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "store"))
    shard = copy / "latents/original/c/5/0/0/0"
    whole = shard.read_bytes()
    shard.unlink()
    store = open_store(copy)
    with pytest.raises(UserError, match="shard 5 of latents/original"):
        gather(store, open_reader(store, kind))
    shard.write_bytes(whole[:20])
    with pytest.raises(UserError, match="of latents/original"):
        gather(store, open_reader(store, kind))


def test_flipped_scale_is_refused(balanced_store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(balanced_store, tmp_path / "store"))
    chunk = copy / "scale/original/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[7 * 64] ^= 1
    chunk.write_bytes(data)
    store = open_store(copy)
    for kind in READERS:
        with pytest.raises(UserError, match="row 7 fails its checksum"):
            gather(store, open_reader(store, kind))


def test_row_outside_of_the_store_is_an_index_error(pristine_store: Path) -> None:
    store = open_store(pristine_store)
    for kind in READERS:
        for row in (-1, store.n):
            with pytest.raises(IndexError):
                gather(store, open_reader(store, kind), np.array([row]), np.array([0]))


def test_without_a_compiler_reading_goes_on_in_python(
    pristine_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gather_library.cache_clear()
    native_reader.announce.cache_clear()
    store = open_store(pristine_store)
    try:
        readers = [open_reader(store), open_reader(store)]
        assert [reader.name for reader in readers] == ["buffered", "buffered"]
        assert capsys.readouterr().out.count("no C compiler (no-such-compiler)") == 1
        with pytest.raises(UserError, match=r"loader.reader is native.*no C compiler"):
            open_reader(store, "native")
        with pytest.raises(NativeUnavailableError):
            NativeReader(store)
    finally:
        gather_library.cache_clear()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4095, 6143, 6144, 6145, 24575, 24576, 24577, 30_720, 100_001])
def test_native_checksum_is_crc32c(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    whole = gather_library().rae_crc32c(data.ctypes.data, size, 0)
    assert whole == google_crc32c.value(data.tobytes())
    first = gather_library().rae_crc32c(data.ctypes.data, size // 3, 0)
    rest = np.ascontiguousarray(data[size // 3 :])
    assert gather_library().rae_crc32c(rest.ctypes.data, len(rest), first) == whole


def test_more_shards_than_the_soft_limit_of_open_files_are_served(pristine_store: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    store = open_store(pristine_store)
    NativeReader(store, mode="direct")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard >= soft


def test_unknown_reader_is_refused(pristine_store: Path) -> None:
    with pytest.raises(UserError, match=r"loader.reader is 'object'.*auto or one of tensorstore"):
        open_reader(open_store(pristine_store), "object")
