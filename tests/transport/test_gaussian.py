"""Conversions and samplers against a Gaussian data distribution, where everything is known in closed form.

With x1 ~ N(m, s^2) and x_t = alpha x1 + sigma x0:  x_t ~ N(alpha m, V),  V = alpha^2 s^2 + sigma^2,
    score = -(x - alpha m) / V
    E[x0 | x_t] = sigma (x - alpha m) / V
    E[x1 | x_t] = m + alpha s^2 (x - alpha m) / V
    v = alpha' E[x1 | x_t] + sigma' E[x0 | x_t]
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from rae_fast.config import SamplerParams, SamplerSection, TransportParams
from rae_fast.transport.grid import GRIDS, scalar
from rae_fast.transport.objective import LOSS_WEIGHTS, PREDICTIONS, Transport
from rae_fast.transport.paths import PATHS, Path, build_path
from rae_fast.transport.samplers import FIXED_STEP, sample, sample_ode
from rae_fast.transport.sde import DIFFUSION_FORMS, sample_sde

MEAN, STD = 0.7, 0.4
TIMES = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)


class Gaussian:
    """Exact posterior means of one path, as models of each kind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def standardized(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.path.at(t, x)
        return (x - c.alpha * MEAN) / (c.alpha**2 * STD**2 + c.sigma**2), c.alpha, c.sigma

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        z, _, sigma = self.standardized(x, t)
        return sigma * z

    def data(self, x: Tensor, t: Tensor) -> Tensor:
        z, alpha, _ = self.standardized(x, t)
        return MEAN + alpha * STD**2 * z

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.standardized(x, t)[0]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.path.at(t, x)
        return c.d_alpha * self.data(x, t) + c.d_sigma * self.noise(x, t)


def states(path: Path) -> Tensor:
    torch.manual_seed(0)
    data = MEAN + STD * torch.randn(len(TIMES), 2, 3, dtype=torch.float64)
    return path.interpolate(data, torch.randn_like(data), TIMES)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_the_coefficients(name: str) -> None:
    t = TIMES.clone().requires_grad_()
    c = build_path(name).coefficients(t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative.detach())


@pytest.mark.parametrize("name", PATHS)
def test_path_runs_from_data_to_noise(name: str) -> None:
    c = build_path(name).coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(c.alpha, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(c.sigma, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=7e-3, rtol=0)
    assert (c.wronskian > 0).all() and c.wronskian.isfinite().all()


@pytest.mark.parametrize("name", PATHS)
def test_conversions_agree_with_the_exact_posterior(name: str) -> None:
    path = build_path(name)
    exact, x = Gaussian(path), states(path)
    velocity = exact.velocity(x, TIMES)
    torch.testing.assert_close(path.noise_from_velocity(velocity, x, TIMES), exact.noise(x, TIMES))
    torch.testing.assert_close(path.data_from_velocity(velocity, x, TIMES), exact.data(x, TIMES))
    torch.testing.assert_close(path.score_from_velocity(velocity, x, TIMES), exact.score(x, TIMES))
    for kind in ("noise", "data", "score"):
        convert = getattr(path, f"velocity_from_{kind}")
        torch.testing.assert_close(convert(getattr(exact, kind)(x, TIMES), x, TIMES), velocity)


@pytest.mark.parametrize("name", PATHS)
def test_drift_and_score_make_the_velocity(name: str) -> None:
    """v = f - g^2 / 2 * score; the reference's VP drift fails this."""
    path = build_path(name)
    exact, x = Gaussian(path), states(path)
    drift, half_squared = path.drift(x, TIMES)
    assert (half_squared > 0).all()
    torch.testing.assert_close(drift - half_squared * exact.score(x, TIMES), exact.velocity(x, TIMES))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_exact_model_beats_a_wrong_one_under_every_loss(name: str, prediction: str) -> None:
    transport = Transport(TransportParams(path_type=name, prediction=prediction))
    generator = torch.Generator().manual_seed(1)
    data = MEAN + STD * torch.randn(4000, 1, 1, 1, generator=generator)
    noise = torch.randn(4000, 1, 1, 1, generator=generator)
    t = transport.sample_time(torch.rand(4000, generator=generator)).clamp(0.05, 0.95)
    model = getattr(Gaussian(transport.path), prediction)
    best = transport.loss(model, data, t, noise).mean()
    for wrong in (lambda x, t: 1.1 * model(x, t), lambda x, t: model(x, t) + 0.1):
        assert best < transport.loss(wrong, data, t, noise).mean()


@pytest.mark.parametrize("name", PATHS)
def test_data_prediction_trains_with_the_velocity_loss(name: str) -> None:
    as_data = Transport(TransportParams(path_type=name, prediction="data"))
    as_velocity = Transport(TransportParams(path_type=name))
    path = as_data.path
    torch.manual_seed(2)
    data, noise = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    t = torch.tensor([0.3, 0.6, 0.9])

    def predicted_data(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    def implied_velocity(x: Tensor, t: Tensor) -> Tensor:
        return path.velocity_from_data(predicted_data(x, t), x, t)

    torch.testing.assert_close(
        as_data.loss(predicted_data, data, t, noise), as_velocity.loss(implied_velocity, data, t, noise)
    )


def final_moments(x: Tensor) -> tuple[float, float]:
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("grid", ["full", "reference"])
def test_ode_ends_in_the_data_distribution(name: str, prediction: str, grid: str) -> None:
    transport = Transport(TransportParams(path_type=name, prediction=prediction))
    model = getattr(Gaussian(transport.path), prediction)
    torch.manual_seed(3)
    noise = torch.randn(2000, 1, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    params = SamplerParams(sampling_method="heun", num_steps=200, grid=grid)
    result = sample(SamplerSection("ODE", params), transport, lambda x, t: model(x, scalar(t)), noise)
    mean, std = final_moments(result)
    # On VP the velocity is infinite at t = 1: the reference's grid starts there, ours at 1 - 1e-3.
    tolerance = 5e-3 if name != "VP" else 0.04 if grid == "reference" else 0.01
    assert mean == pytest.approx(MEAN, abs=tolerance)
    assert std == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize("shift", [0.3, 7.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_ode_ends_near_its_data_for_every_method_grid_and_shift(name: str, prediction: str, shift: float) -> None:
    """Between Gaussians the flow is affine: noise z ends at m + s z."""
    transport = Transport(TransportParams(path_type=name, prediction=prediction), shift=shift)
    model = getattr(Gaussian(transport.path), prediction)
    noise = torch.linspace(-2, 2, 9)[:, None]
    for grid in GRIDS:
        for method in (*FIXED_STEP, "dopri5"):
            params = SamplerParams(sampling_method=method, num_steps=30, grid=grid)
            result = sample(
                SamplerSection("ODE", params),
                transport,
                lambda x, t: model(x, t.double() if isinstance(t, Tensor) else scalar(t)).float(),
                noise,
            )
            error = (result - (MEAN + STD * noise)).abs().max().item()
            # The reference's grid starts on VP where the velocity is infinite, and takes one Euler step from there.
            assert error < (2.0 if name == "VP" and grid == "reference" else 0.25), (grid, method)


# Likelihood with predicted data is refused, see test_samplers.py.
LOSSES = [pair for pair in product(PREDICTIONS, LOSS_WEIGHTS) if pair != ("data", "likelihood")]


@pytest.mark.parametrize(("prediction", "weight"), LOSSES)
@pytest.mark.parametrize("name", PATHS)
def test_losses_are_finite_and_not_negative_at_all_times_that_are_drawn(
    name: str, prediction: str, weight: str
) -> None:
    uniforms = torch.tensor([0.0, 1e-9, 1e-4, 0.3, 0.7, 0.999, 1 - 2**-24])
    data, noise = torch.randn(2, 7, 2, 3, 3, generator=torch.Generator().manual_seed(7))
    for times in ("uniform", "logit-normal_0_1"):
        for shift in (0.3, 1.0, 7.0):
            params = TransportParams(path_type=name, prediction=prediction, loss_weight=weight, time_dist_type=times)
            transport = Transport(params, shift)
            loss = transport.loss(lambda x, t: 0.3 * x, data, transport.sample_time(uniforms), noise)
            assert loss.isfinite().all() and (loss >= 0).all(), (times, shift)


ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "heun3": 3, "rk4": 4}


@pytest.mark.parametrize("method", ORDERS)
def test_ode_method_converges_at_its_order(method: str) -> None:
    exact = Gaussian(build_path("GVP"))
    noise = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def solve(steps: int, name: str = method) -> Tensor:
        return sample_ode(lambda x, t: exact.velocity(x, scalar(t)), noise, method=name, num_steps=steps, grid="full")

    truth = solve(500, "rk4")
    coarse, fine = ((solve(n) - truth).norm().item() for n in (40, 80))
    assert coarse / fine == pytest.approx(2 ** ORDERS[method], rel=0.25)


def test_every_fixed_step_method_has_a_tested_order() -> None:
    assert {method for method in FIXED_STEP if method != "heun2"} == set(ORDERS)
    assert FIXED_STEP["heun2"] is FIXED_STEP["heun"]


def noise_source(count: int) -> tuple[Tensor, object]:
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    return start, lambda step: torch.randn(count, 1, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("name", PATHS)
def test_sde_ends_in_the_data_distribution_for_every_form(name: str, form: str, method: str) -> None:
    transport = Transport(TransportParams(path_type=name))
    exact = Gaussian(transport.path)
    start, draw = noise_source(4000)
    result = sample_sde(
        transport,
        lambda x, t: exact.velocity(x, scalar(t)),
        start,
        draw,
        method=method,
        num_steps=200,
        grid="full",
        diffusion_form=form,
        diffusion_norm=0.8,
        last_step="Tweedie",
        last_step_size=0.01,
    )
    mean, std = final_moments(result)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("last_step", [None, "Mean", "Tweedie", "euler"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("grid", ["full", "reference"])
def test_sde_is_finite_for_every_prediction_and_last_step(prediction: str, last_step: str | None, grid: str) -> None:
    for name in PATHS:
        transport = Transport(TransportParams(path_type=name, prediction=prediction), shift=3.0)
        model = getattr(Gaussian(transport.path), prediction)
        for form in ("SBDM", "constant", "Sigma", "linear", "decreasing", "inccreasing-decreasing"):
            for method in ("Euler", "Heun"):
                start, draw = noise_source(16)
                result = sample_sde(
                    transport,
                    lambda x, t, model=model: model(x, scalar(t)),
                    start.float(),
                    lambda step, draw=draw: draw(step).float(),
                    method=method,
                    num_steps=6,
                    grid=grid,
                    diffusion_form=form,
                    last_step=last_step,
                )
                assert result.isfinite().all() and result.abs().max() < 50, (name, form, method)


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_sde_marginals_are_exact_along_the_way(form: str) -> None:
    """The standard deviation half way, which depends on drift and diffusion being consistent."""
    transport = Transport(TransportParams(path_type="GVP"))
    exact = Gaussian(transport.path)
    start, draw = noise_source(8000)
    halfway: dict[str, Tensor] = {}

    def model(x: Tensor, t: float) -> Tensor:
        if "x" not in halfway and t <= 0.5:
            halfway.update(x=x, t=scalar(t))
        return exact.velocity(x, scalar(t))

    sample_sde(transport, model, start, draw, num_steps=200, grid="full", diffusion_form=form)
    c = transport.path.coefficients(halfway["t"])
    mean, std = final_moments(halfway["x"])
    assert mean == pytest.approx((c.alpha * MEAN).item(), abs=0.025)
    assert std == pytest.approx(torch.sqrt(c.alpha**2 * STD**2 + c.sigma**2).item(), rel=0.03)


def test_reverse_ode_returns_to_the_noise_it_came_from() -> None:
    exact = Gaussian(build_path("Linear"))
    noise = torch.randn(20, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def velocity(x: Tensor, t: float) -> Tensor:
        return exact.velocity(x, scalar(t))

    data = sample_ode(velocity, noise, method="rk4", num_steps=100, grid="full")
    back = sample_ode(velocity, data, method="rk4", num_steps=100, grid="full", reverse=True)
    torch.testing.assert_close(back, noise, atol=1e-6, rtol=0)
