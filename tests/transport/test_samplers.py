"""Grids, time distributions, and how samplers answer to bad settings."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rae_fast.config import Config, Misc, SamplerParams, SamplerSection, TransportParams
from rae_fast.errors import UserError
from rae_fast.transport.grid import GRIDS, time_grid
from rae_fast.transport.guidance import guided_velocity
from rae_fast.transport.objective import PREDICTIONS, TimeDistribution, Transport, shift_from_size, shift_time
from rae_fast.transport.paths import PATHS
from rae_fast.transport.samplers import ADAPTIVE, sample, sample_ode
from rae_fast.transport.sde import sample_sde

SHIFT = shift_from_size(768 * 16 * 16)


def test_reference_grid_of_50_is_49_steps_that_end_at_0_0069() -> None:
    times = time_grid(50, "reference", SHIFT)
    assert len(times) == 50
    assert times[0] == 1.0
    assert times[-1] == pytest.approx(0.00689, abs=1e-5)


@pytest.mark.parametrize("shift", [0.3, 1.0, SHIFT])
def test_full_grid_takes_exactly_n_steps_to_0(shift: float) -> None:
    times = time_grid(50, "full", shift)
    assert len(times) == 51
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert all(later < earlier for earlier, later in pairwise(times))


@pytest.mark.parametrize(("method", "calls"), [("euler", 10), ("heun", 20), ("midpoint", 20), ("RK4", 40)])
def test_fixed_step_methods_cost_what_they_should(method: str, calls: int) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return x

    sample_ode(velocity, torch.ones(1), method=method, num_steps=10, grid="full")
    assert len(seen) == calls
    assert all(isinstance(t, float) for t in seen)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_never_ask_for_times_below_0_on_the_full_grid(method: str) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return x * t

    end = sample_ode(velocity, torch.ones(1), method=method, grid="full", rtol=1e-5)
    assert min(seen) >= 0
    assert end.item() == pytest.approx(torch.tensor(-0.5).exp().item(), rel=1e-2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("mode", "method"), [("ODE", "euler"), ("ODE", "rk4"), ("SDE", "euler"), ("SDE", "heun")])
def test_fixed_step_methods_never_read_values_back(mode: str, method: str, prediction: str) -> None:
    """On the meta device tensors have no values: whatever waits for one on a GPU fails here."""
    noise = torch.empty(2, 3, 4, 4, device="meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")

    def model(x: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        return x * t_B.reshape(-1, 1, 1, 1) + y.reshape(-1, 1, 1, 1)

    for path in PATHS:
        transport = Transport(TransportParams(path_type=path, prediction=prediction))
        guided = guided_velocity(model, y=labels, null_label=9, scale=2.0, t_min=0.3, t_max=0.8)
        for grid in GRIDS:
            section = SamplerSection(mode, SamplerParams(sampling_method=method, num_steps=6, grid=grid))
            end = sample(section, transport, guided, noise, lambda step: torch.empty_like(noise))
            assert (end.shape, end.dtype) == (noise.shape, noise.dtype)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    noise = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    draws = torch.randn(20, 6, 2, 2, 2, generator=torch.Generator().manual_seed(1))

    def run(rows: slice) -> Tensor:
        return sample_sde(
            Transport(), lambda x, t: torch.tanh(x), noise[rows], lambda step: draws[step, rows], num_steps=20
        )

    assert torch.equal(run(slice(0, 6))[2:4], run(slice(2, 4)))


def test_sampler_section_chooses_the_sampler() -> None:
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, t: float) -> Tensor:
        return x

    ode = sample(SamplerSection("ODE", SamplerParams(num_steps=5)), Transport(), model, noise)
    torch.testing.assert_close(ode, sample_ode(model, noise, num_steps=5))
    params = SamplerParams(num_steps=5, diffusion_form="linear")
    sde = sample(SamplerSection("sde", params), Transport(), model, noise, lambda step: torch.zeros_like(noise))
    assert sde.shape == noise.shape
    with pytest.raises(UserError, match="source of noise"):
        sample(SamplerSection("SDE", params), Transport(), model, noise)
    with pytest.raises(UserError, match=r"sampler\.mode"):
        sample(SamplerSection("PDE", params), Transport(), model, noise)


def test_shift_comes_from_the_latent_size_and_its_override() -> None:
    assert pytest.approx(6.9282, abs=1e-4) == SHIFT
    assert Transport.from_config(Config(), (768, 32, 32)).shift == pytest.approx(13.8564, abs=1e-4)
    assert Transport.from_config(Config(misc=Misc(time_dist_shift_dim=1024)), (768, 32, 32)).shift == 0.5


def test_shift_of_s_undoes_shift_of_one_over_s() -> None:
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_time(shift_time(t, 5.0), 1 / 5.0), t)


@pytest.mark.parametrize("location", [-0.4, 0.0, 1.0])
def test_logit_normal_has_its_median_at_the_location(location: float) -> None:
    times = TimeDistribution.parse(f"logit-normal_{location}_1.3").sample(torch.linspace(0, 1, 1001), 0.0, 1.0)
    assert times.median().item() == pytest.approx(torch.sigmoid(torch.tensor(location)).item(), abs=1e-6)
    assert times.min() >= 0 and times.max() <= 1


def test_times_stay_inside_the_training_interval() -> None:
    u = torch.tensor([0.0, 1e-9, 0.5, 1 - 2**-24])
    for params in (TransportParams(), TransportParams(prediction="noise", time_dist_type="logit-normal_0_1")):
        times = Transport(params).sample_time(u)
        assert times.dtype == torch.float32
        assert times.isfinite().all() and times.min() >= 0 and times.max() <= 0.999 + 1e-6


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (TransportParams(path_type="Linaer"), "did you mean 'Linear'"),
        (TransportParams(prediction="velocty"), "did you mean 'velocity'"),
        (TransportParams(loss_weight="likelyhood"), "did you mean 'likelihood'"),
        (TransportParams(time_dist_type="logit-normal_0"), "logit-normal_<mu>_<sigma>"),
        (TransportParams(time_dist_type="logit-normal_a_b"), "logit-normal_<mu>_<sigma>"),
        (TransportParams(prediction="noise", train_eps=0.7), "train_eps"),
        (TransportParams(prediction="data", loss_weight="likelihood"), "prediction: data"),
    ],
)
def test_bad_transport_settings_are_refused_with_the_key(params: TransportParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Transport(params)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_shift_is_refused(shift: float) -> None:
    with pytest.raises(UserError, match="shift"):
        Transport(shift=shift)


def test_bad_sampler_settings_are_refused() -> None:
    noise = torch.zeros(1, 1)
    with pytest.raises(UserError, match="did you mean 'dopri5'"):
        sample_ode(lambda x, t: x, noise, method="dopri55")
    with pytest.raises(UserError, match="num_steps"):
        sample_ode(lambda x, t: x, noise, num_steps=1)
    with pytest.raises(UserError, match="grid"):
        sample_ode(lambda x, t: x, noise, grid="ful")
    settings = {"sampling_method": {"method": "euler2"}, "last_step": {"last_step": "Meen"}}
    settings["diffusion_form"] = {"diffusion_form": "sigmoid"}
    for key, value in settings.items():
        with pytest.raises(UserError, match=key):
            sample_sde(Transport(), lambda x, t: x, noise, lambda step: noise, **value)
