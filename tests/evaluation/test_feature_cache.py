"""Figures computed block by block: the same whatever the number of ranks, after a crash, and when a rank dies."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from rae_fast.evaluation import feature_cache
from rae_fast.evaluation.feature_cache import Figures, collect
from rae_fast.runtime import Ranks

COUNT = 23


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 4)


def figures(calls: list[int] | None = None, fail_at: int | None = None) -> Figures:
    data = np.random.default_rng(0).standard_normal((COUNT, 5)).astype(np.float32)

    def compute(start: int, stop: int) -> tuple[bytes, dict[str, np.ndarray]]:
        if start == fail_at:
            raise KeyboardInterrupt
        if calls is not None:
            calls.append(start)
        return hashlib.sha256(data[start:stop].tobytes()).digest(), {"features": data[start:stop]}

    return Figures({"images": "a"}, COUNT, compute, "test")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("block-*"))}


def test_moments_and_arrays_are_those_of_all_images(tmp_path: Path) -> None:
    found = collect(figures(), tmp_path, Ranks())
    assert found is not None and found.names == ["features"]
    rows = found.array("features")
    assert rows.shape == (COUNT, 5)
    for _ in range(2):  # the second time from its file
        mean, covariance = found.moments("features")
        np.testing.assert_allclose(mean, rows.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-14)
    assert found.array("features", 4).tolist() == rows[[0, 7, 15, 22]].tolist()


def test_ranks_share_the_work_and_leave_the_same_files(tmp_path: Path) -> None:
    alone = collect(figures(), tmp_path / "alone", Ranks())
    calls: list[list[int]] = [[], [], []]
    found: list[object] = [None] * 3

    def rank(r: int) -> None:
        found[r] = collect(figures(calls[r]), tmp_path / "together", Ranks(r, r, 3))

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(start for each in calls for start in each) == list(range(0, COUNT, 4)), "every block once"
    assert files(tmp_path / "alone") == files(tmp_path / "together")
    assert found[0] is not None and found[1] is None and found[2] is None
    assert found[0].content_sha256 == alone.content_sha256
    assert not list(tmp_path.rglob("*.claim"))


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        collect(figures(first, fail_at=12), tmp_path, Ranks())
    second: list[int] = []
    assert collect(figures(second), tmp_path, Ranks()) is not None
    assert first == [0, 4, 8] and second == [12, 16, 20]
    third: list[int] = []
    collect(figures(third), tmp_path, Ranks())
    assert third == []


def test_rank_0_takes_over_what_a_dead_rank_had_claimed(tmp_path: Path) -> None:
    folder = tmp_path / figures().digest
    folder.mkdir(parents=True)
    other = (folder / "000001.claim").open("a")
    fcntl.flock(other, fcntl.LOCK_EX)
    assert collect(figures(), tmp_path, Ranks(1, 1, 2)) is None, "another rank leaves it and goes"
    calls: list[int] = []
    death = threading.Timer(0.5, other.close)
    death.start()
    assert collect(figures(calls), tmp_path, Ranks(0, 0, 2)) is not None
    assert calls == [4]


def test_other_images_or_another_extractor_are_other_files() -> None:
    ours = figures()
    assert Figures({"images": "b"}, COUNT, ours.compute, "x").digest != ours.digest
    assert Figures(ours.key, COUNT + 1, ours.compute, "x").digest != ours.digest
    assert Figures(ours.key, COUNT, ours.compute, "another label").digest == ours.digest
