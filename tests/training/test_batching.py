from __future__ import annotations

from dataclasses import replace

import pytest

from rae_fast.config import Training
from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.training.batching import BatchPlan, checkpoint_interval, count_steps, ema_decays, plan_batches


@pytest.mark.parametrize(
    ("world", "options", "plan"),
    [
        (8, {"global_batch_size": 1024}, BatchPlan(128, 1, 1024)),
        (8, {"global_batch_size": 1024, "grad_accum_steps": 4}, BatchPlan(32, 4, 1024)),
        (8, {"global_batch_size": 1024, "batch_size": 64}, BatchPlan(64, 2, 1024)),
        (1, {"global_batch_size": 1024, "batch_size": 64, "grad_accum_steps": 16}, BatchPlan(64, 16, 1024)),
        (2, {"batch_size": 4, "grad_accum_steps": 3}, BatchPlan(4, 3, 24)),
        (2, {}, BatchPlan(16, 1, 32)),
    ],
)
def test_sizes_complete_one_another(world, options, plan):
    assert plan_batches(Training(**options), Ranks(world=world)) == plan


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"global_batch_size": 10}, "a multiple of 4"),
        ({"global_batch_size": 12, "batch_size": 2}, "batch_size 2 on 4 ranks; expected a multiple of 8"),
        ({"global_batch_size": 16, "batch_size": 2, "grad_accum_steps": 4}, "grad_accum_steps 2, or none"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_sizes_that_contradict_one_another_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        plan_batches(Training(**options), Ranks(world=4))


def test_length_and_intervals_count_optimizer_steps():
    training = Training(epochs=3)
    assert count_steps(training, 10) == 30
    assert count_steps(replace(training, max_steps=7), 10) == 7
    assert checkpoint_interval(replace(training, checkpoint_interval=0.5), 10) == 5
    assert checkpoint_interval(replace(training, checkpoint_interval=4, checkpoint_every=9), 10) == 9
    assert checkpoint_interval(replace(training, checkpoint_interval=None), 10) is None
    with pytest.raises(UserError, match="fewer samples than one optimizer step"):
        count_steps(training, 0)


def test_ema_decay_is_one_or_several():
    assert ema_decays(Training(ema_decay=0.9)) == [0.9]
    assert ema_decays(Training(ema_decay=[0.9, "power_0.1"])) == [0.9, "power_0.1"]
