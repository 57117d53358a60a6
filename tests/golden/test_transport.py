"""Transport against the numbers of the reference (golden README, section 2)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from rae_fast.config import TransportParams
from rae_fast.transport.grid import time_grid
from rae_fast.transport.objective import TimeDistribution, Transport, check_interval, shift_time
from rae_fast.transport.paths import build_path
from rae_fast.transport.samplers import ADAPTIVE, sample_ode
from rae_fast.transport.sde import diffusion, sample_sde

if TYPE_CHECKING:
    from conftest import Golden

GATE = 2e-6
ADAPTIVE_GATE = 2e-3


@pytest.fixture
def arrays(read_golden: Callable[[str], Golden]) -> Golden:
    return read_golden("transport/transport.npz")


def matches(arrays: Golden, pattern: str) -> list[re.Match[str]]:
    """The arrays whose whole name matches; the test is skipped where there is none."""
    found = [match for key in arrays.arrays.files if (match := re.fullmatch(pattern, key))]
    if not found:
        pytest.skip(f"no arrays {pattern} in {arrays.path}")
    return found


def assert_close(ours: Tensor, theirs: Tensor, what: str, gate: float = GATE) -> None:
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)
    assert ours.shape == theirs.shape, what
    assert error <= gate, f"{what}: rel {error:.2e} > {gate:.0e}"


def affine_model(x: Tensor, t: Tensor | float) -> Tensor:
    t = t.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(t, Tensor) else t
    return 0.3 * x + 0.1 * t


def analytic_velocity(x: Tensor, t: Tensor | float) -> Tensor:
    t = torch.as_tensor(t, dtype=torch.float32)
    t = t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t
    return x * (0.8 - 1.1 * t) + 0.5 * torch.sin(3 * t)


def test_paths_are_the_reference_s(arrays: Golden) -> None:
    t, noise, data = arrays["in/t"], arrays["in/x0_noise"], arrays["in/x1_data"]
    for name in {match[1] for match in matches(arrays, r"path/(\w+)/alpha")}:
        path, key = build_path(name), f"path/{name}/"
        c = path.coefficients(t)
        for field in ("alpha", "sigma", "d_alpha", "d_sigma"):
            assert_close(getattr(c, field), arrays[key + field], key + field)
        assert_close(c.d_alpha / c.alpha, arrays[key + "d_alpha_over_alpha"], key + "d_alpha_over_alpha")
        assert_close(path.interpolate(data, noise, t), arrays[key + "xt"], key + "xt")
        assert_close(path.target_velocity(data, noise, t), arrays[key + "ut"], key + "ut")


@pytest.mark.parametrize("name", ["Linear", "GVP"])
def test_conversions_and_drift_are_the_reference_s(arrays: Golden, name: str) -> None:
    """VP is left out: the reference's drift does not match its own alpha and sigma there (tests/transport has it)."""
    key, path, t = f"path/{name}/", build_path(name), arrays["in/t"]
    x = arrays[key + "xt"]
    output = analytic_velocity(x, t)
    for conversion in ("score_from_velocity", "noise_from_velocity", "velocity_from_score"):
        # The same model output stands for a velocity in the first two and for a score in the third.
        assert_close(getattr(path, conversion)(output, x, t), arrays[key + conversion], key + conversion)
    mean, half_squared = path.drift(x, t)
    # The reference's time runs the other way in its drift.
    assert_close(-mean, arrays[key + "drift_mean"], key + "drift_mean")
    assert_close(-half_squared.reshape(-1), arrays[key + "drift_var"], key + "drift_var")


def test_diffusion_forms_are_the_reference_s(arrays: Golden) -> None:
    """All but SBDM, which is negative there; ours is its opposite."""
    t = arrays["in/t"]
    for match in matches(arrays, r"path/(\w+)/diffusion_norm([\d.]+)/(.+)"):
        name, norm, form = match[1], float(match[2]), match[3]
        ours = torch.tensor([diffusion(build_path(name), form, float(value), norm) for value in t])
        theirs = arrays[match[0]]
        if form == "SBDM" and name == "VP":
            assert (ours > 0).all()
        else:
            assert_close(ours, -theirs if form == "SBDM" else theirs, match[0])


def test_times_are_the_reference_s(arrays: Golden) -> None:
    u = arrays["time/u"]
    for match in matches(arrays, r"time/(VPnoise_)?(.+)/shift([\d.]+)"):
        params = TransportParams(
            path_type="VP" if match[1] else "Linear",
            prediction="noise" if match[1] else "velocity",
            time_dist_type=match[2],
        )
        ours = Transport(params, shift=float(match[3])).sample_time(u)
        # File names carry the shift with six decimals only.
        assert_close(ours, arrays[match[0]], match[0])


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_losses_are_the_reference_s(arrays: Golden, path: str) -> None:
    """Likelihood weights on Linear and GVP are negative in the reference: ours are their opposites."""
    t, noise, data = arrays["in/t"], arrays["in/x0_noise"], arrays["in/x1_data"]
    for match in matches(arrays, rf"loss/{path}/(\w+)/(\w+)"):
        prediction, weight = match[1], match[2]
        theirs = arrays[match[0]]
        transport = Transport(TransportParams(path_type=path, prediction=prediction, loss_weight=weight))
        ours = transport.loss(affine_model, data, t, noise)
        assert ours.dtype == torch.float32
        if path == "VP" and prediction != "velocity" and weight != "none":
            assert (ours > 0).all()  # weights built on the reference's inconsistent VP drift
        elif weight == "likelihood" and prediction != "velocity":
            assert_close(ours, -theirs, match[0])
        else:
            assert_close(ours, theirs, match[0])


def test_losses_with_drawn_times_are_the_reference_s(arrays: Golden) -> None:
    shift = max(float(match[1]) for match in matches(arrays, r"ode/tgrid_n\d+_shift([\d.]+)"))
    for match in matches(arrays, r"loss_full/(?!u$)(.+)"):
        transport = Transport(TransportParams(time_dist_type=match[1]), shift=shift)
        t = transport.sample_time(arrays["loss_full/u"])
        loss = transport.loss(affine_model, arrays["in/x1_data"], t, arrays["in/x0_noise"])
        assert_close(loss, arrays[match[0]], match[0])


def test_grid_is_the_reference_s(arrays: Golden) -> None:
    for match in matches(arrays, r"ode/tgrid_n(\d+)_shift([\d.]+)"):
        ours = torch.tensor(time_grid(int(match[1]), "reference", float(match[2])))
        assert_close(ours, arrays[match[0]], match[0])


def test_ode_ends_where_the_reference_does(arrays: Golden) -> None:
    z = arrays["ode/z"]
    for match in matches(arrays, r"ode/Linear_velocity/(\w+)/n(\d+)/shift([\d.]+)(/all)?"):
        method, steps, shift = match[1], int(match[2]), float(match[3])
        ours = sample_ode(analytic_velocity, z, method=method, num_steps=steps, shift=shift, trajectory=bool(match[4]))
        assert_close(ours, arrays[match[0]], match[0], ADAPTIVE_GATE if method in ADAPTIVE else GATE)


def test_adaptive_ode_solves_the_equation(arrays: Golden) -> None:
    """At loose tolerances the reference's own end points are up to 0.7 % off; those of tight tolerances are exact."""
    z = arrays["ode/z"].double()
    exact = sample_ode(analytic_velocity, z, method="rk4", num_steps=200, grid="full")
    for method in ADAPTIVE:
        loose = sample_ode(analytic_velocity, z, method=method, grid="full")
        assert_close(loose, exact, f"{method} at rtol 1e-3", 1e-2)
    tight = sample_ode(analytic_velocity, z, method="dopri5", grid="full", atol=1e-9, rtol=1e-9)
    assert_close(tight, exact, "dopri5 at rtol 1e-9", 1e-6)


def test_ode_of_other_predictions_ends_where_the_reference_does(arrays: Golden) -> None:
    """VP noise and score are left out: they rest on the reference's inconsistent VP drift."""
    z = arrays["ode/z"]
    for match in matches(arrays, r"ode/(\w+)_(\w+)/(\w+)/n(\d+)"):
        path, prediction, method, steps = match[1], match[2], match[3], int(match[4])
        theirs = arrays[match[0]]
        params = TransportParams(path_type=path, prediction=prediction, train_eps=1e-3, sample_eps=1e-3)
        transport = Transport(params)
        ours = sample_ode(
            lambda x, t, transport=transport: transport.velocity(affine_model(x, t), x, torch.tensor(t).double()),
            z,
            method=method,
            num_steps=steps,
            interval=transport.sampling_interval(),
        )
        if path == "VP" and prediction != "velocity":
            assert ours.isfinite().all()
        else:
            assert_close(ours, theirs, match[0])


SDE = r"(\w+)/([\w-]+)/last(\w+)/n(\d+)/shift([\d.]+)"


def sample_sde_as_recorded(arrays: Golden, setting: re.Match[str]) -> Tensor:
    """The end point of one combination that `SDE` matched."""
    method, form, last_step, steps, shift = setting.groups()
    noise, settings = arrays["sde/noise"], arrays.meta["sde_kwargs"]
    return sample_sde(
        Transport(shift=float(shift)),
        analytic_velocity,
        arrays["ode/z"],
        lambda step: noise[step],
        method=method,
        num_steps=int(steps),
        diffusion_form=form,
        last_step=last_step,
        diffusion_norm=settings["diffusion_norm"],
        last_step_size=settings["last_step_size"],
    )


def test_sde_ends_where_the_reference_does(arrays: Golden) -> None:
    for match in matches(arrays, "sde/Linear_velocity/" + SDE):
        assert_close(sample_sde_as_recorded(arrays, match), arrays[match[0]], match[0])


def test_sde_is_finite_where_the_reference_is_not(arrays: Golden) -> None:
    for combination, outcome in arrays.meta["sde"].items():
        match = re.fullmatch(SDE, combination)
        if outcome == "ok" or not match:
            continue
        ours = sample_sde_as_recorded(arrays, match)
        assert ours.isfinite().all(), combination
        assert ours.abs().max() < 100, combination


def test_intervals_are_the_reference_s_where_it_has_any(golden_file: Callable[[str], Path]) -> None:
    file = golden_file("transport/check_interval.json")
    compared = 0
    for case in json.loads(file.read_text()):
        for entry in case["intervals"]:
            eps = case["sample_eps"] if entry["eval"] else case["train_eps"]
            # None: the reference forgot to resolve it and raises TypeError wherever it is used.
            if eps is None or entry["t0_t1"] == "TypeError":
                continue
            ours = check_interval(
                case["path"],
                case["prediction"],
                eps,
                sde=entry["sde"],
                diffusion_form=entry["form"],
                last_step_size=entry["last_step_size"],
                reverse=entry["reverse"],
            )
            assert ours == pytest.approx(entry["t0_t1"], abs=1e-12), (case["path"], case["prediction"], entry)
            compared += 1
    assert compared


def test_resolved_eps_are_the_reference_s_where_it_resolves_them(golden_file: Callable[[str], Path]) -> None:
    file = golden_file("transport/check_interval.json")
    for case in json.loads(file.read_text()):
        params = TransportParams(
            path_type=case["path"],
            prediction=case["prediction"],
            train_eps=case["train_eps_arg"],
            sample_eps=case["sample_eps_arg"],
        )
        transport = Transport(params)
        assert transport.train_eps == case["train_eps"]
        if case["sample_eps"] is not None:
            assert transport.sample_eps == case["sample_eps"]


def test_shift_below_one_works() -> None:
    """The reference refuses it (golden README, section 9)."""
    assert shift_time(0.5, 0.25) == pytest.approx(0.2)
    times = TimeDistribution.parse("uniform").sample(torch.tensor([0.5]), 0.0, 1.0)
    assert Transport(shift=0.25).sample_time(torch.tensor([0.5])) < times
