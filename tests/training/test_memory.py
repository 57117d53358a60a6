from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rae_fast.dit.registry import build_dit
from rae_fast.training.memory import advise, plan_memory

GIB = 2**30


@pytest.fixture(scope="module")
def xl():
    with torch.device("meta"):
        return build_dit("DiTDH-XL", {"input_size": 16, "in_channels": 768, "num_classes": 1000})


def test_states_of_the_large_model_are_its_float32_tensors(xl):
    one = plan_memory(xl, micro_batch=1, zero_stage=0)
    assert one.parameters == 838_380_628
    # Weights, gradients, two moments, one EMA.
    assert one.state_bytes == 5 * 4 * one.parameters
    eight = plan_memory(xl, micro_batch=1, world=8, zero_stage=1)
    assert eight.state_bytes == 2 * 4 * one.parameters + 4 * 4 * one.parameters // 8
    assert replace(eight, zero_stage=3).state_bytes < replace(eight, zero_stage=2).state_bytes < eight.state_bytes


def test_activations_are_near_those_measured_on_the_official_blocks(xl):
    # 691 MB a sample under the official autocast.
    assert plan_memory(xl, micro_batch=1).activation_bytes == pytest.approx(691e6, rel=0.1)
    assert plan_memory(xl, micro_batch=8, checkpointing=True).activation_bytes < 1.5 * 691e6


def test_advice_is_the_mildest_change_that_fits(xl):
    too_much = plan_memory(xl, micro_batch=256)
    assert "training.batch_size=256 runtime.activation_checkpointing=true" in advise(too_much, 140 * GIB)
    small = advise(plan_memory(xl, micro_batch=64), 24 * GIB)
    assert "activation_checkpointing=true" in small
    assert "training.batch_size=" in small


def test_sharding_is_advised_where_ranks_share(xl):
    assert "deepspeed=configs/deepspeed/zero" in advise(plan_memory(xl, micro_batch=4, world=8), 8 * GIB)


def test_device_is_believed_more_than_the_estimate(xl):
    plan = plan_memory(xl, micro_batch=8, checkpointing=True)
    assert "training.batch_size=4" in advise(plan, 140 * GIB)


def test_no_way_out_is_said(xl):
    assert "no setting fits 4.0 GiB" in advise(plan_memory(xl, micro_batch=1), 4 * GIB)


def test_advice_for_ddp_names_the_engine_that_can_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from rae_fast.config_file import load_config
    from rae_fast.geometry import Geometry
    from rae_fast.runtime import Ranks
    from rae_fast.training.batching import BatchPlan, plan_batches
    from rae_fast.training.dit_setup import out_of_memory

    ranks = Ranks(0, 0, 8)
    config = load_config(None, ["stage_2.target=DiTDH-XL", "runtime.engine=ddp", "training.batch_size=4"])
    batches: BatchPlan = plan_batches(config.training, ranks)
    small = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    geometry = Geometry((768, 16, 16), 256, 1000, 1000, 6.93)
    error = out_of_memory(config, geometry, batches, ranks, torch.device("cuda"), torch.OutOfMemoryError("full"))
    assert "deepspeed=configs/deepspeed/zero" in str(error) and "runtime.engine=deepspeed" in str(error)
