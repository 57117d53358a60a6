"""Several stores from one decode: the bytes of stores built alone, whatever each of them has already."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images.decode import Failure, ImageBatch, ImagePipeline
from rae_fast.images.drift import IMAGES
from rae_fast.latents.store import open_store
from rae_fast.latents.together import BATCHES_AHEAD, SharedDecode
from rae_fast.latents.writer import build_cache, build_caches

Configs = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each decode of more than a drift measurement was asked for."""
    counts, original = [], ImagePipeline.__iter__

    def counting(self: ImagePipeline) -> Iterator[ImageBatch]:
        if len(self.positions) > IMAGES:
            counts.append(len(self.positions))
        return original(self)

    monkeypatch.setattr(ImagePipeline, "__iter__", counting)
    return counts


def also(path: Path) -> str:
    return (
        f"cache.also=[{{path: {path}, stage_1.params.encoder_params.layers: [0], cache.codec: balanced, "
        "cache.shard_size: 5, cache.encode_batch: 4, cache.views: [original]}]"
    )


def test_stores_of_one_pass_have_the_bytes_of_stores_built_alone(
    cache_config: Configs,
    tmp_path: Path,
    pristine_store: Path,
    files_of: Callable[[Path], dict[str, Any]],
    decoded: list[int],
) -> None:
    reports = build_caches(cache_config(tmp_path / "a", "cache.pixels=true", also(tmp_path / "b")))
    assert decoded == [41]
    assert [(report.url, report.images, report.failures) for report in reports] == [
        (str(tmp_path / "a"), 41, 1),
        (str(tmp_path / "b"), 41, 1),
    ]
    assert files_of(tmp_path / "a") == files_of(pristine_store)
    alone = (
        "cache.pixels=true",
        "stage_1.params.encoder_params.layers=[0]",
        "cache.codec=balanced",
        "cache.shard_size=5",
        "cache.encode_batch=4",
        "cache.views=[original]",
    )
    build_cache(cache_config(tmp_path / "c", *alone))
    assert open_store(tmp_path / "b").attrs["encoder"]["layers"] == [0]
    assert files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_a_finished_store_is_left_alone_and_the_other_is_built(
    cache_config: Configs, tmp_path: Path, files_of: Callable[[Path], dict[str, Any]], decoded: list[int]
) -> None:
    build_cache(cache_config(tmp_path / "a"))
    before = files_of(tmp_path / "a")
    config = cache_config(tmp_path / "a", also(tmp_path / "b"))
    assert [report.encoded for report in build_caches(config)] == [0, 41]
    assert files_of(tmp_path / "a") == before
    assert [report.encoded for report in build_caches(config)] == [0, 0]
    assert decoded == [41, 41]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{cache.codec: balanced}", "its `path`"),
        ("{path: STORE}", "name one store twice"),
        ("{path: b, data.crop: fast}", r"has data\.crop fast, the first has exact"),
        ("{path: b, cache.precision: bf16}", r"has cache\.precision bf16"),
        ("{path: b, cache.codecs: compact}", "cache.codec"),
    ],
)
def test_stores_that_cannot_share_a_pass_are_refused(
    cache_config: Configs, tmp_path: Path, entry: str, message: str
) -> None:
    store = tmp_path / "a"
    with pytest.raises(UserError, match=message):
        build_caches(cache_config(store, f"cache.also=[{entry.replace('STORE', str(store))}]"))
    assert not store.exists()


def test_what_stops_one_store_stops_all_and_is_said(
    cache_config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of: Any, pristine_store: Path
) -> None:
    config = cache_config(tmp_path / "a", "cache.pixels=true", also(tmp_path / "b"))
    from rae_fast.latents import passes

    original = passes.write_record

    def failing(storage: Any, record: Any) -> None:
        if storage.url.endswith("b") and record.shard == 3:
            raise UserError("cannot write", "room", "")
        original(storage, record)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "write_record", failing)
        with pytest.raises(UserError, match="cannot write"):
            build_caches(config)
    build_caches(config)
    assert files_of(tmp_path / "a") == files_of(pristine_store)


class Images:
    """A decode that counts, in batches of 4; position 6 is a failure."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made: list[int] = []
        self.fail_at = fail_at

    def __call__(self, positions: np.ndarray, device: torch.device) -> Iterator[ImageBatch]:
        for first in range(0, len(positions), 4):
            part = torch.from_numpy(positions[first : first + 4])
            if self.fail_at is not None and self.fail_at in part:
                raise RuntimeError("the decoder broke")
            self.made += part.tolist()
            failures = [Failure(6, "six", "bad")] if 6 in part else []
            yield ImageBatch(part, part[:, None, None, None].to(torch.uint8), part != 6, failures)


def read(shared: SharedDecode, source: Any, reader: int, positions: list[int], pause_s: float = 0.0) -> list[Any]:
    got = []
    try:
        for batch in source(np.array(positions), CPU):
            time.sleep(pause_s)
            got += zip(batch.positions_B.tolist(), batch.images_B3SS.flatten().tolist(), strict=True)
            got += batch.failures
    finally:
        shared.leave(reader)
    return got


def shared_of(decode: Images, readers: int, patience_s: float = 20.0) -> tuple[SharedDecode, list[Any]]:
    from rae_fast.latents.sources import ImageSource

    shared = SharedDecode(decode, readers, patience_s)
    source = ImageSource((), np.zeros(0), (), "", "", "", decode, lambda device: {})
    return shared, [share.decode for share in shared.shares(source)]


def test_readers_that_want_different_images_get_theirs_from_one_decode() -> None:
    decode = Images()
    shared, shares = shared_of(decode, 3)
    wanted = ([0, 1, 2, 3, 6, 30], [2, 6, 7, 8, 9, 10, 11, 12], [])
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(read, shared, shares[i], i, wanted[i], 0.01 * i) for i in range(2)]
        shared.leave(2)  # this store is complete: it asks for nothing, and nobody waits for it
        results = [future.result(30) for future in futures]
    for positions, got in zip(wanted, results, strict=False):
        assert [item for item in got if not isinstance(item, Failure)] == [(p, p) for p in positions]
        assert [item.position for item in got if isinstance(item, Failure)] == [6]
    assert decode.made == sorted({*wanted[0], *wanted[1]})


def test_no_reader_runs_away_from_the_slowest() -> None:
    decode = Images()
    _, shares = shared_of(decode, 2)
    slow, fast = (share(np.arange(100), CPU) for share in shares)
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(next, batches) for batches in (slow, fast)]
        [future.result(30) for future in first]
        rest = pool.submit(list, fast)
        time.sleep(0.2)
        assert not rest.done()
        assert len(decode.made) <= 4 * (2 + BATCHES_AHEAD)
        assert len(list(slow)) == 24
        assert len(rest.result(30)) == 24


def test_a_broken_decoder_is_told_to_every_reader() -> None:
    shared, shares = shared_of(Images(fail_at=9), 2)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(read, shared, shares[i], i, list(range(20))) for i in range(2)]
        for future in futures:
            with pytest.raises(RuntimeError, match="the decoder broke"):
                future.result(30)


def test_a_reader_that_ends_early_does_not_hold_the_others() -> None:
    shared, shares = shared_of(Images(), 2)
    barrier = threading.Barrier(2)

    def leave_early() -> None:
        batches = shares[0](np.arange(40), CPU)
        next(batches)
        barrier.wait(30)
        batches.close()
        shared.leave(0)

    def stay() -> int:
        batches = shares[1](np.arange(40), CPU)
        count = len(next(batches).valid_B)
        barrier.wait(30)
        return count + sum(len(batch.valid_B) for batch in batches)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(leave_early)
        assert pool.submit(stay).result(30) == 40


def test_a_reader_whose_fellow_waits_for_other_ranks_goes_on_alone() -> None:
    decode = Images()
    shared, shares = shared_of(decode, 2, patience_s=0.1)
    assert len(read(shared, shares[0], 0, [1, 2, 3])) == 3
    assert len(read(shared, shares[1], 1, [1, 2, 3])) == 3


def test_positions_out_of_order_are_decoded_apart() -> None:
    decode = Images()
    shared, shares = shared_of(decode, 2)
    assert [item[0] for item in read(shared, shares[0], 0, [5, 1, 3])] == [5, 1, 3]
