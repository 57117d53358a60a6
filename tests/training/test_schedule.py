"""Learning rate schedules: shapes, conversions, refusals."""

from __future__ import annotations

import pytest

from rae_fast.config import Scheduler
from rae_fast.errors import UserError
from rae_fast.training.schedule import build_schedule


def rates(scheduler: Scheduler, steps: int, **settings: object) -> list[float]:
    schedule = build_schedule(scheduler, **{"lr": 1.0, "steps_per_epoch": 10, **settings})
    return [schedule(step) for step in range(steps)]


def test_linear_holds_then_falls_to_final_and_stays() -> None:
    found = rates(Scheduler("linear", warmup_steps=2, decay_end_steps=6, final_lr=0.2), 9)
    assert found == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_warm_up_from_zero_reaches_base_at_its_last_step() -> None:
    found = rates(Scheduler("constant", warmup_steps=4, warmup_from_zero=True), 6)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine_is_half_way_at_half_time() -> None:
    found = rates(Scheduler("cosine", decay_end_steps=8, final_lr=0.2), 9)
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.6)
    assert found[8] == 0.2
    assert found == sorted(found, reverse=True)


def test_wsd_is_stable_for_80_percent_then_falls_to_zero_at_the_end_of_the_run() -> None:
    found = rates(Scheduler("wsd", warmup_steps=10, warmup_from_zero=True), 111, total_steps=110)
    assert found[9:91] == [1.0] * 82
    assert found[100] == pytest.approx(0.5)
    assert found[110] == 0.0


def test_epochs_are_converted_and_steps_win_over_them() -> None:
    by_epochs = rates(Scheduler("linear", warmup_epochs=0.5, decay_end_epoch=2, final_lr=0.0), 25)
    assert by_epochs[5] == 1.0
    assert by_epochs[6] < 1.0
    assert by_epochs[20] == 0.0
    both = Scheduler("linear", warmup_epochs=9, warmup_steps=5, decay_end_epoch=9, decay_end_steps=20, final_lr=0.0)
    assert rates(both, 25) == by_epochs


def test_base_lr_wins_over_the_optimizer_s_lr() -> None:
    assert rates(Scheduler("constant", base_lr=0.3), 2) == [0.3, 0.3]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_without_end_and_final_lr_stays_at_base(kind: str) -> None:
    assert rates(Scheduler(kind, warmup_steps=2), 5) == [1.0] * 5


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Scheduler("cosin"), "did you mean 'cosine'"),
        (Scheduler("wsd"), "without an end"),
        (Scheduler("linear", warmup_steps=9, decay_end_steps=5), "before the warm-up does"),
        (Scheduler("linear", base_lr=-1.0), "positive"),
    ],
)
def test_bad_schedules_are_refused(scheduler: Scheduler, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_schedule(scheduler, lr=1.0, steps_per_epoch=10)
