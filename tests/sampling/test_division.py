"""Work over ranks that know of one another by files alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.sampling.division import Division, Writer, numbered


class Made:
    """A set of items in memory, and who made them."""

    def __init__(self) -> None:
        self.items: dict[int, int] = {}

    def division(self, rank: int, world: int, stall_s: float = 60.0, total: int = 20) -> Division:
        return Division(total, 3, Ranks(rank, rank, world), lambda: set(self.items), "testing", stall_s)

    def work(self, rank: int, world: int, stall_s: float = 60.0, delay_s: float = 0.0) -> None:
        def make(unit: np.ndarray) -> None:
            time.sleep(delay_s)
            self.items.update((i, rank) for i in unit.tolist())

        self.division(rank, world, stall_s).work(make, lambda: None)


def test_units_cover_everything_once() -> None:
    units = Made().division(0, 1).units()
    assert np.array_equal(np.concatenate(units), np.arange(20))
    assert [len(unit) for unit in units] == [3] * 6 + [2]


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_all_ranks_together_make_everything(world: int) -> None:
    made = Made()
    for rank in reversed(range(world)):
        made.work(rank, world)
    assert sorted(made.items) == list(range(20))


def test_rank_0_waits_for_the_others_and_leaves_their_work_to_them() -> None:
    made = Made()
    other = threading.Thread(target=made.work, args=(1, 2), kwargs={"delay_s": 0.2})
    other.start()
    made.work(0, 2)
    assert sorted(made.items) == list(range(20))
    assert {made.items[i] for i in (3, 4, 5, 9, 15)} == {1}
    other.join()


def test_rank_0_does_what_a_dead_rank_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    made = Made()
    made.work(0, 3, stall_s=0.0)
    assert set(made.items.values()) == {0} and len(made.items) == 20
    assert capsys.readouterr().err.count("nothing new for 0 s: rank 0 goes on with the 12 left") == 1


def test_what_is_there_is_not_made_again() -> None:
    made = Made()
    made.items = dict.fromkeys([0, 1, 2, 3, 4, 6, 7, 8], 7)
    made.work(0, 1)
    assert [made.items[i] for i in range(9)] == [7, 7, 7, 0, 0, 0, 7, 7, 7]


def test_the_writer_holds_two_units_at_most_and_reports_failures() -> None:
    running, most = [0], [0]

    def write() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.01)
        running[0] -= 1

    with Writer(threads=8) as writer:
        for _ in range(6):
            writer.submit([(write, ())])
        writer.wait()
    assert 1 <= most[0] <= 3 and running[0] == 0

    def fail() -> None:
        raise OSError(28, "No space left on device", "images/000001.png")

    with pytest.raises(UserError, match=r"cannot write images/000001\.png: No space left"), Writer() as writer:
        writer.submit([(fail, ())])
        writer.wait()


def test_numbered_files_are_found_and_others_are_not(tmp_path: Path) -> None:
    for name in ("000003.png", "000010.png", ".000011.png.x.part", "grid.png", "000012.txt"):
        (tmp_path / name).touch()
    assert numbered(tmp_path, ".png") == {3, 10}
    assert numbered(tmp_path / "nowhere", ".png") == set()
