"""Guidance: the formulas, where they hold, and how many rows of which model they cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.transport.guidance import guided_velocity, scale_outside_pairs
from rae_fast.transport.samplers import sample_ode

NULL = 9
Y = torch.tensor([1, 2, 3])


class CountingModel:
    """A model with label-dependent output that records the rows of every call."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.shape[0] == t.shape[0] == y.shape[0]
        self.rows.append(len(x))
        return self.factor * (x * t.reshape(-1, 1) + y.reshape(-1, 1))


def latents() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_cfg_costs_one_forward_of_twice_the_rows_inside_the_interval_and_no_null_branch_outside() -> None:
    model = CountingModel()
    velocity = guided_velocity(model, y=Y, null_label=NULL, scale=2.5, t_min=0.2, t_max=0.7)
    for t in (0.1, 0.2, 0.5, 0.7, 0.71):
        velocity(latents(), t)
    assert model.rows == [3, 6, 6, 6, 3]


def test_autoguidance_never_doubles_the_batch_and_runs_the_guide_only_inside() -> None:
    model, guide = CountingModel(), CountingModel(0.5)
    velocity = guided_velocity(
        model, y=Y, null_label=NULL, scale=1.42, t_min=0.2, t_max=0.7, method="autoguidance", guide=guide
    )
    for t in (0.1, 0.5, 0.9):
        velocity(latents(), t)
    assert model.rows == [3, 3, 3]
    assert guide.rows == [3]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_no_guidance_costs_one_forward_of_the_batch(scale: float) -> None:
    model = CountingModel()
    velocity = guided_velocity(model, y=Y, null_label=NULL, scale=scale)
    for t in (0.0, 0.5, torch.full((3,), 0.5)):
        velocity(latents(), t)
    assert model.rows == [3, 3, 3]


def test_a_guided_ode_of_50_reference_steps_calls_the_model_49_times() -> None:
    model = CountingModel()
    velocity = guided_velocity(model, y=Y, null_label=NULL, scale=2.0, t_min=0.5, t_max=1.0)
    sample_ode(velocity, latents(), num_steps=50)
    assert len(model.rows) == 49
    assert set(model.rows) == {3, 6}


def test_formulas() -> None:
    model, guide, x, t = CountingModel(), CountingModel(0.5), latents(), torch.full((3,), 0.4)
    conditional, null = model(x, t, Y), model(x, t, torch.full_like(Y, NULL))
    cfg = guided_velocity(model, y=Y, null_label=NULL, scale=3.0)
    torch.testing.assert_close(cfg(x, 0.4), null + 3 * (conditional - null))
    auto = guided_velocity(model, y=Y, null_label=NULL, scale=3.0, method="autoguidance", guide=guide)
    weak = guide(x, t, Y)
    torch.testing.assert_close(auto(x, 0.4), weak + 3 * (conditional - weak))


@pytest.mark.parametrize("method", ["cfg", "autoguidance"])
def test_one_time_for_all_and_a_time_per_sample_agree(method: str) -> None:
    x, times = latents(), torch.tensor([0.1, 0.2, 0.9])
    velocity = guided_velocity(
        CountingModel(), y=Y, null_label=NULL, scale=2.0, t_min=0.2, t_max=0.7, method=method, guide=CountingModel(0.5)
    )
    mixed = velocity(x, times)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(mixed[i], velocity(x, t)[i])


def test_interval_ends_are_compared_in_float32_as_the_reference_does() -> None:
    model = CountingModel()
    velocity = guided_velocity(model, y=Y, null_label=NULL, scale=2.0, t_min=0.2, t_max=0.7)
    velocity(latents(), 1 - 0.8)  # 0.19999999999999996 in float64
    assert model.rows == [6]


def test_lightning_dit_pairs_switch_guidance_off() -> None:
    pairs = [(0.2, 0.5)]
    assert [scale_outside_pairs(t, 2.0, pairs) for t in (0.1, 0.2, 0.4, 0.5)] == [2.0, 1.0, 1.0, 2.0]
    assert scale_outside_pairs(0.3, 2.0, pairs, interval_scale=1.7) == 1.7
    assert scale_outside_pairs(0.3, 2.0, []) == 2.0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'autoguidance'"):
        guided_velocity(CountingModel(), y=Y, null_label=NULL, method="autoguidence")
    with pytest.raises(UserError, match="without a guide"):
        guided_velocity(CountingModel(), y=Y, null_label=NULL, method="autoguidance", scale=2.0)
    with pytest.raises(UserError, match="t_min"):
        guided_velocity(CountingModel(), y=Y, null_label=NULL, scale=2.0, t_min=0.8, t_max=0.2)
