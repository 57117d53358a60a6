"""Dormand and Prince's method with steps of each sample's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from rae_fast.errors import UserError
from rae_fast.transport.adaptive import dopri5

RATES = torch.tensor([0.5, 3.0, 9.0], dtype=torch.float64)


def decay(x: Tensor, t: Tensor, rates: Tensor = RATES) -> Tensor:
    """dx/dt = -r x cos t, a rate for each sample: x(t) = x(0) exp(-r sin t)."""
    return -rates[:, None] * torch.cos(t)[:, None] * x


def start() -> Tensor:
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.3), (1.3, 0.0)])
@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_the_solution_is_as_exact_as_asked_for(low: float, high: float, rtol: float) -> None:
    found = dopri5(decay, start(), low, high, atol=1e-12, rtol=rtol)
    exact = start() * torch.exp(-RATES * (math.sin(high) - math.sin(low)))[:, None]
    torch.testing.assert_close(found, exact, rtol=30 * rtol, atol=1e-10)


def test_a_sample_has_the_same_bits_whatever_it_is_solved_together_with() -> None:
    together = dopri5(decay, start(), 1.0, 0.0, atol=1e-6, rtol=1e-3)
    for i in range(3):
        alone = dopri5(lambda x, t, i=i: decay(x, t, RATES[i : i + 1]), start()[i : i + 1], 1.0, 0.0, 1e-6, 1e-3)
        assert torch.equal(together[i : i + 1], alone)


def test_a_sample_takes_no_more_evaluations_than_with_torchdiffeq() -> None:
    calls, rate = {"ours": 0, "torchdiffeq": 0}, RATES[1:2]

    def counted(name: str, x: Tensor, t: Tensor) -> Tensor:
        calls[name] += 1
        return decay(x, t.expand(1), rate)

    dopri5(lambda x, t: counted("ours", x, t), start()[1:2], 0.0, 1.0, 1e-6, 1e-3)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    odeint(lambda t, x: counted("torchdiffeq", x, t), start()[1:2], times, method="dopri5", atol=1e-6, rtol=1e-3)
    assert calls["ours"] <= calls["torchdiffeq"]


def test_float32_states_stay_float32() -> None:
    assert dopri5(lambda x, t: decay(x, t).float(), start().float(), 0.0, 1.0, 1e-6, 1e-3).dtype == torch.float32


def test_a_slope_that_is_not_finite_ends_in_an_error_and_not_in_a_loop() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] > 0.5, torch.nan, 1.0) * torch.ones_like(x)

    with pytest.raises(UserError, match="steps have shrunk"):
        dopri5(broken, start(), 0.0, 1.0, 1e-6, 1e-3)
