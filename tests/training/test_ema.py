"""Running averages: formulas, guards, and lengths chosen afterwards."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rae_fast.errors import UserError
from rae_fast.training.ema import (
    EMA,
    FlatEMA,
    gamma_of_sigma_rel,
    profile_product,
    reconstruct,
    reconstruction_weights,
    sigma_rel_of_gamma,
)


def walk(steps: int) -> Tensor:
    """Weights [steps, 5] of a made-up training."""
    return torch.randn(steps, 5, generator=torch.Generator().manual_seed(0)).cumsum(0)


def test_several_decays_run_at_once_and_each_is_its_formula() -> None:
    weights = walk(20)
    ema = FlatEMA([weights[0, :2], weights[0, 2:]], [0.9, 0.5, 0.0])
    expected = {decay: weights[0].double() for decay in (0.9, 0.5, 0.0)}
    for row in weights[1:]:
        ema.update([row[:2], row[2:]])
        expected = {decay: decay * old + (1 - decay) * row.double() for decay, old in expected.items()}
    for decay, value in expected.items():
        torch.testing.assert_close(torch.cat(ema.shards(decay)).double(), value, rtol=2e-6, atol=2e-6)
    assert ema.shards() is ema.shards("0.9")
    assert torch.equal(torch.cat(ema.shards(0.0)), weights[-1])


def test_a_skipped_step_leaves_the_averages_untouched_to_the_bit() -> None:
    ema = FlatEMA([torch.ones(3)], [0.9])
    before = ema.shards()[0].clone()
    ema.update([torch.full((3,), 7.0)], keep=torch.tensor(0.0, dtype=torch.float64))
    assert torch.equal(ema.shards()[0], before)
    ema.update([torch.full((3,), 7.0)], keep=torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(ema.shards()[0], torch.full((3,), 1.6))


def test_averages_do_not_alias_the_weights() -> None:
    master = torch.zeros(2)
    ema = FlatEMA([master], [0.5, 0.9])
    master.fill_(3.0)
    assert all((ema.shards(label)[0] == 0).all() for label in ema.labels)


def test_power_average_weighs_steps_by_tau_to_the_gamma() -> None:
    weights, sigma_rel = walk(400), 0.1
    ema = FlatEMA([torch.zeros(5)], [f"power_{sigma_rel}"])
    for step, row in enumerate(weights, start=1):
        ema.update([row], step=step)
    taus = torch.arange(1, 401, dtype=torch.float64)
    share = taus ** gamma_of_sigma_rel(sigma_rel)
    expected = (share[:, None] * weights.double()).sum(0) / share.sum()
    torch.testing.assert_close(ema.shards()[0].double(), expected, rtol=0.02, atol=0.02)


def test_width_and_exponent_convert_both_ways() -> None:
    for sigma_rel in (0.01, 0.05, 0.1, 0.2, 0.28):
        assert sigma_rel_of_gamma(gamma_of_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel)
    # EDM2 quotes gamma = 16.97 and 6.94 for 0.05 and 0.10.
    assert gamma_of_sigma_rel(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of_sigma_rel(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize(
    ("a", "b"), [((2.0, 30.0), (5.0, 50.0)), ((5.0, 50.0), (2.0, 30.0)), ((3.0, 40.0), (3.0, 40.0))]
)
def test_profile_products_are_the_integrals(a: tuple[float, float], b: tuple[float, float]) -> None:
    tau = np.linspace(0, 60, 600_001)

    def profile(gamma: float, step: float) -> np.ndarray:
        return np.where(tau <= step, (gamma + 1) * tau**gamma / step ** (gamma + 1), 0.0)

    integral = np.trapezoid(profile(*a) * profile(*b), tau)
    assert profile_product(*a, *b) == pytest.approx(integral, rel=1e-3)


def test_reconstruction_returns_what_was_stored_and_any_length_between() -> None:
    weights, stored = walk(600), []
    ema = FlatEMA([torch.zeros(5)], ["power_0.05", "power_0.1", "power_0.07"])
    for step, row in enumerate(weights, start=1):
        ema.update([row], step=step)
        if step % 50 == 0:
            for s in (0.05, 0.1):
                stored.append((s, step, partial(dict, w=ema.shards(f"power_{s}")[0].clone())))
    same = reconstruct(stored, 0.05)["w"]
    torch.testing.assert_close(same, ema.shards("power_0.05")[0], rtol=1e-4, atol=1e-4)
    other = reconstruct(stored, 0.07)["w"]
    truth = ema.shards("power_0.07")[0]
    nearest = min((ema.shards(f"power_{s}")[0] - truth).norm() for s in (0.05, 0.1))
    assert (other - truth).norm() < 0.1 * nearest
    assert reconstruction_weights([(s, t) for s, t, _ in stored], 0.07).sum() == pytest.approx(1, abs=0.01)


def test_module_average_follows_parameters_and_leaves_buffers_and_frozen_ones() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[0].bias.requires_grad_(False)
    ema = EMA(module, [0.5])
    before = module[0].weight.detach().clone()
    with torch.no_grad():
        module[0].weight += 1
    ema.update(module)
    assert set(ema.weights()) == {"0.weight", "1.weight", "1.bias"}
    torch.testing.assert_close(ema.weights()["0.weight"], before + 0.5)
    ema.copy_to(module)
    torch.testing.assert_close(module[0].weight.detach(), before + 0.5)


@pytest.mark.parametrize("decay", [1.0, -0.1, "fast", "power_0", "power_0.5", None])
def test_bad_decays_are_refused(decay: object) -> None:
    with pytest.raises(UserError, match="ema_decay"):
        FlatEMA([torch.zeros(1)], [decay])


def test_unknown_or_doubled_decays_are_refused() -> None:
    with pytest.raises(UserError, match=r"one of 0\.9"):
        FlatEMA([torch.zeros(1)], [0.9]).shards(0.99)
    with pytest.raises(UserError, match="none"):
        FlatEMA([torch.zeros(1)], []).shards()
    with pytest.raises(UserError, match="different decays"):
        FlatEMA([torch.zeros(1)], [0.9, 0.9])
