from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rae_fast import rng
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images import decode
from rae_fast.images.resample import crop_into
from rae_fast.latents.loader import LatentBatch, LatentLoader, build_loader
from rae_fast.latents.online import open_online_loader
from rae_fast.latents.order import BLOCKS_MIXED, Order
from rae_fast.latents.store import LatentStore, open_store
from rae_fast.runtime import NICENESS, Ranks

INVALID = 18  # the truncated image's row


@pytest.fixture
def store(pristine_store: Path) -> LatentStore:
    return open_store(pristine_store)


def take(loader: Any, count: int) -> list[LatentBatch]:
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def rows_of(batches: list[LatentBatch]) -> list[int]:
    return [row for batch in batches for row in batch.index_B.tolist()]


def test_truncated_image_is_where_these_tests_expect_it(store: LatentStore) -> None:
    assert np.flatnonzero(~store.valid).tolist() == [INVALID]


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
def test_epoch_serves_every_valid_row_once_and_no_other(store: LatentStore, shuffle: str) -> None:
    loader = LatentLoader(store, batch_size=4, shuffle=shuffle, block_size=5)
    assert (loader.epoch_images, loader.epoch_batches) == (40, 10)
    for epoch in range(2):
        batches = [next(loader) for _ in range(10)]
        assert {batch.epoch for batch in batches} == {epoch}
        assert sorted(rows_of(batches)) == [row for row in range(41) if row != INVALID]
    loader.close()


def test_order_is_a_pure_function_of_seed_and_epoch(store: LatentStore) -> None:
    first = rows_of(take(LatentLoader(store, batch_size=8, seed=3), 10))
    assert first == rows_of(take(LatentLoader(store, batch_size=8, seed=3, prefetch=1), 10))
    assert first != rows_of(take(LatentLoader(store, batch_size=8, seed=4), 10))
    assert first[:40] != first[40:]


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_together_see_what_one_rank_sees(store: LatentStore, world: int) -> None:
    alone = take(LatentLoader(store, batch_size=10, seed=1), 8)
    loaders = [LatentLoader(store, batch_size=10 // world, seed=1, ranks=Ranks(r, r, world)) for r in range(world)]
    for batch in alone:
        parts = [next(loader) for loader in loaders]
        assert torch.equal(torch.cat([part.latents_BCHW for part in parts]), batch.latents_BCHW)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), batch.labels_B)
        assert torch.equal(torch.cat([part.index_B for part in parts]), batch.index_B)
    for loader in loaders:
        loader.close()


def test_steps_are_equal_however_they_are_split_into_micro_batches(store: LatentStore) -> None:
    """12 images a step leave a remainder of 4 in an epoch of 40: it must be cut alike by 12, 2 x 6 and 3 x 4."""
    whole = rows_of(take(LatentLoader(store, batch_size=12, seed=2), 6))
    for batch_size in (6, 4):
        loader = LatentLoader(store, batch_size=batch_size, seed=2, images_per_step=12)
        assert loader.epoch_images == 36
        assert rows_of(take(loader, 72 // batch_size)) == whole


def test_resumed_stream_goes_on_bit_for_bit(store: LatentStore) -> None:
    whole = LatentLoader(store, batch_size=4, seed=5)
    batches = [next(whole) for _ in range(7)]
    state = whole.state()
    assert state == (0, 28)
    expected = take(whole, 9)
    resumed = LatentLoader(store, batch_size=4, seed=5)
    assert len(take(resumed, 2)) == 2
    resumed.seek(*state)
    got = take(resumed, 9)
    assert rows_of(got) == rows_of(expected)
    assert all(torch.equal(a.latents_BCHW, b.latents_BCHW) for a, b in zip(got, expected, strict=True))
    assert got[-1].epoch == 1
    assert len(batches) == 7


def test_seek_to_the_end_of_an_epoch_is_the_start_of_the_next(store: LatentStore) -> None:
    loader = LatentLoader(store, batch_size=4)
    loader.seek(0, 40)
    assert loader.state() == (1, 0)
    with pytest.raises(UserError, match="position 3 of epoch 0"):
        loader.seek(0, 3)


def test_view_is_drawn_per_sample_and_epoch_and_both_come_from_the_store(store: LatentStore) -> None:
    loader = LatentLoader(store, batch_size=8, seed=7)
    views = []
    for _ in range(10):
        batch = next(loader)
        u_B = rng.uniform(7, batch.epoch, batch.index_B, rng.Stream.VIEW)
        for i, row in enumerate(batch.index_B.tolist()):
            view = "hflip" if u_B[i] < 0.5 else "original"
            assert torch.equal(batch.latents_BCHW[i], store.read([row], view)[0])
            views.append(view)
    loader.close()
    assert 0.3 < views.count("hflip") / len(views) < 0.7
    still = take(LatentLoader(store, batch_size=40, flip=False), 1)[0]
    assert torch.equal(still.latents_BCHW, store.read(still.index_B, "original"))


def test_labels_follow_their_rows(store: LatentStore) -> None:
    batch = take(LatentLoader(store, batch_size=40), 1)[0]
    names = [store.class_names[label] for label in batch.labels_B.tolist()]
    assert names == [store.paths[row].split("/")[0] for row in batch.index_B.tolist()]
    assert batch.labels_B.dtype == batch.index_B.dtype == torch.int64


@pytest.mark.parametrize("path", ["balanced_store", "compact_store"])
def test_quantized_stores_are_dequantized(path: str, request: pytest.FixtureRequest) -> None:
    store = open_store(request.getfixturevalue(path))
    batch = take(LatentLoader(store, batch_size=20, flip=False), 1)[0]
    assert torch.equal(batch.latents_BCHW, store.read(batch.index_B, "original"))
    assert batch.latents_BCHW.dtype == torch.float32


def test_only_the_wanted_classes_are_served(store: LatentStore) -> None:
    loader = LatentLoader(store, batch_size=3, classes=[0, 2])
    assert {label for batch in take(loader, 12) for label in batch.labels_B.tolist()} == {0, 2}
    with pytest.raises(UserError, match=r"no valid image of loader.classes \[9\]"):
        LatentLoader(store, batch_size=3, classes=[9])


def test_balanced_epochs_show_every_class_equally_often_and_every_image_in_turn() -> None:
    labels = np.array([0] * 30 + [1] * 3 + [2] * 9)
    order = Order(np.arange(42), labels, seed=1, balanced=True)
    assert order.length == 42
    seen = np.zeros(42, int)
    for epoch in range(30):
        rows = order.epoch(epoch)
        assert np.bincount(labels[rows]).tolist() == [14, 14, 14]
        seen += np.bincount(rows, minlength=42)
    for label in range(3):
        counts = seen[labels == label]
        assert counts.max() - counts.min() <= 1


def test_block_shuffle_stays_within_groups_of_blocks() -> None:
    order = Order(np.arange(1000), np.zeros(1000, int), seed=0, shuffle="block", block_size=10)
    rows = order.epoch(3)
    assert sorted(rows) == list(range(1000))
    for start in range(0, 960, 10 * BLOCKS_MIXED):
        assert len(set(rows[start : start + 10 * BLOCKS_MIXED] // 10)) == BLOCKS_MIXED
    groups = [np.concatenate(group) for group in order.block_groups(3)]
    assert set(groups[0]) == set(rows[: 10 * BLOCKS_MIXED])


def test_damaged_row_ends_the_stream_with_the_way_to_mend_it(pristine_store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pristine_store, tmp_path / "store"))
    shard = copy / "latents/original/c/3/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    loader = LatentLoader(open_store(copy), batch_size=4, shuffle="none", flip=False)
    with pytest.raises(UserError, match=r"shard 3 .*row 24 .*inspect_cache.py repair"):
        take(loader, 10)
    with pytest.raises(UserError, match="shard 3"):
        next(loader)
    loader.close()


def test_more_images_a_step_than_there_are_is_an_error(store: LatentStore) -> None:
    with pytest.raises(UserError, match=r"40 images are fewer than the 64 of one step.*global_batch_size"):
        LatentLoader(store, batch_size=64)


def test_batches_are_ready_before_they_are_asked_for(store: LatentStore) -> None:
    loader = LatentLoader(store, batch_size=4, prefetch=3)
    next(loader)
    for _ in range(5):
        time.sleep(0.1)
        next(loader)
    assert loader.wait_share < 0.2
    assert loader.wait_s >= 0
    loader.close()


def test_loader_section_of_a_config_reaches_the_loader(store: LatentStore, cache_config: Callable[..., Config]) -> None:
    config = cache_config(
        "unused", "loader.shuffle=none", "loader.flip=false", "loader.classes=[1]", "loader.reader=zarr"
    )
    batch = take(build_loader(config.loader, store, batch_size=5), 1)[0]
    assert batch.index_B.tolist() == [row for row in range(41) if store.labels[row] == 1 and row != INVALID][:5]


def test_online_twin_serves_the_same_stream(
    pristine_store: Path, store: LatentStore, cache_config: Callable[..., Config]
) -> None:
    """A failed image aside, whose place the online loader fills: the classes leave it out here."""
    config = cache_config(pristine_store, "loader.source=online", "loader.classes=[0,2]")
    cached = take(build_loader(config.loader, store, batch_size=3, seed=4, images_per_step=6), 12)
    online = open_online_loader(config, image_size=32, batch_size=3, seed=4, images_per_step=6)
    for expected in cached:
        got = next(online)
        assert torch.equal(got.index_B, expected.index_B)
        assert torch.equal(got.labels_B, expected.labels_B)
        assert got.epoch == expected.epoch
        assert torch.allclose(got.latents_BCHW, expected.latents_BCHW, atol=5e-3)
    state = online.state()
    following = next(online)
    online.seek(*state)
    assert torch.equal(next(online).index_B, following.index_B)
    online.close()


def test_online_twin_replaces_an_unreadable_image(
    pristine_store: Path, cache_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = cache_config(pristine_store, "loader.source=online", "loader.shuffle=none", "loader.flip=false")
    loader = open_online_loader(config, image_size=32, batch_size=41)
    for _ in range(2):
        batch = next(loader)
        assert torch.equal(batch.latents_BCHW[INVALID], batch.latents_BCHW[0])
    loader.close()
    assert capsys.readouterr().out.count("cannot read square/013.jpg") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
def test_threads_that_decode_online_give_way_to_the_one_that_trains(
    pristine_store: Path, cache_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal claims, they kept it waiting until their queue was full, and a core idle from then on."""
    config = cache_config(pristine_store, "loader.source=online")
    before, seen = set(thread_priorities()), {}

    def spy(*args: Any) -> None:
        seen.update(thread_priorities())
        crop_into(*args)

    monkeypatch.setattr(decode, "crop_into", spy)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    take(open_online_loader(config, image_size=32, batch_size=8), 1)
    started = [priority for thread, priority in seen.items() if thread not in before]
    giving_way = [priority for priority in started if priority == max(own, NICENESS)]
    # The loader's own thread, which hands the batches over, and torch's helpers of the one that trains do not.
    assert len(started) - len(giving_way) <= torch.get_num_threads() < len(giving_way)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def thread_priorities() -> dict[int, int]:
    """Niceness of each thread of this process, by its id."""
    found = {}
    for entry in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it ended
            found[int(entry.name)] = os.getpriority(os.PRIO_PROCESS, int(entry.name))
    return found


def test_online_without_statistics_is_an_error(cache_config: Callable[..., Config], tmp_path: Path) -> None:
    config = cache_config(tmp_path / "nothing", "loader.source=online")
    with pytest.raises(UserError, match="no latent store"):
        open_online_loader(config, image_size=32, batch_size=4)


LEFT_OPEN = """
import time, torch
from rae_fast.latents.loader import BatchStream, _Producer

class Busy(BatchStream):
    prefetch = 2

    def __init__(self):
        pass

    def _prepare(self, epoch, position):
        while True:
            for _ in range(4):
                product = torch.randn(1500, 1500) @ torch.randn(1500, 1500)
            yield product

producer = _Producer(Busy(), 0, 0)
producer.take()
time.sleep(0.05)
raise SystemExit(2)
"""


def test_a_process_that_leaves_a_loader_open_keeps_its_exit_status() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["pristine_store", "balanced_store"])
def test_batches_on_a_gpu_equal_those_on_the_cpu(path: str, request: pytest.FixtureRequest) -> None:
    store = open_store(request.getfixturevalue(path))
    on_cpu = take(LatentLoader(store, batch_size=8, seed=1), 25)
    for device_batch, batch in zip(
        take(LatentLoader(store, batch_size=8, seed=1, device="cuda"), 25), on_cpu, strict=True
    ):
        assert device_batch.latents_BCHW.is_cuda
        assert torch.equal(device_batch.latents_BCHW.cpu(), batch.latents_BCHW)
        assert torch.equal(device_batch.index_B.cpu(), batch.index_B)


@pytest.mark.usefixtures("three_threads")
def test_batches_are_made_without_helper_threads(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second team of OpenMP threads in the loader's thread made training on a CPU half as fast."""
    seen = []
    decode = type(store.codec).decode

    def spy(*args: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return decode(*args)

    monkeypatch.setattr(type(store.codec), "decode", spy)
    take(LatentLoader(store, batch_size=8), 2)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 3
