"""Dormand and Prince's method with steps of each sample's own.

torchdiffeq chooses one step for a whole batch by its joint error, so that a sample comes out differently with other
neighbours. Here each has its own time and step, and a batch takes as many evaluations as its most difficult sample.

Shapes: B samples, [B, ...] the state; times, steps and errors [B].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rae_fast.errors import UserError

VectorVelocity = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t float64 [B]) -> dx/dt [B, ...]

# Dormand and Prince, 1980: RK5(4)7M. The last row gives the solution, and its derivative is the next step's first.
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
# Solution of fifth order less the embedded one of fourth.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
ORDER = 5
SAFETY, LARGEST, SMALLEST = 0.9, 10.0, 0.2  # factors of the next step, as torchdiffeq has them
SHORTEST = 1e-12  # a step below this gets nowhere: the slope is not finite, or jumps


def dopri5(velocity: VectorVelocity, x: Tensor, start: float, end: float, atol: float, rtol: float) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from `start` to `end` (which may be less); the state keeps its dtype.

    A step is accepted where the root mean square of error / (atol + rtol max(|x|, |x'|)) over a sample's values is at
    most 1. The device is waited for once a step, to see whether all samples have arrived.

    Raises:
        UserError: the steps of a sample have become too short to get anywhere.
    """
    direction = 1.0 if end >= start else -1.0
    t = torch.full((len(x),), start, dtype=torch.float64, device=x.device)
    slope = velocity(x, t)
    h = _first_step(velocity, x, t, slope, direction, atol, rtol)
    while True:
        left = (end - t).abs()
        h = torch.minimum(h, left)
        last = h >= left
        new_x, slopes = _step(velocity, x, t, direction * h, slope)
        error = sum(weight * k for weight, k in zip(ERROR, slopes, strict=True) if weight)
        ratio = _norm(_each(h, x) * error / (atol + rtol * torch.maximum(x.abs(), new_x.abs())))
        ratio = ratio.nan_to_num(nan=torch.inf)
        accepted = ratio <= 1
        t = torch.where(accepted, torch.where(last, end, t + direction * h), t)
        x = torch.where(_each(accepted, x), new_x, x)
        slope = torch.where(_each(accepted, x), slopes[-1], slope)
        factor = (SAFETY * ratio.clamp(min=1e-10) ** (-1 / ORDER)).clamp(SMALLEST, LARGEST)
        h = h * torch.where(accepted, factor.clamp(min=1.0), factor)
        there = t == end
        arrived, stuck = torch.stack([there.all(), (~there & (h < SHORTEST)).any()]).tolist()
        if arrived:
            return x
        if stuck:
            raise UserError(
                f"dopri5: steps have shrunk to {SHORTEST} before t = {end}",
                "a velocity that is finite and continuous",
                "check the checkpoint, or set sampler.params.sampling_method=euler",
            )


def _step(velocity: VectorVelocity, x: Tensor, t: Tensor, h: Tensor, slope: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The state after a step, and the seven slopes; the last is that of the new state."""
    slopes, point = [slope], x
    for weights, time in zip(STAGES, TIMES, strict=True):
        moved = sum(weight * k for weight, k in zip(weights, slopes, strict=True) if weight)
        point = x + _each(h, x) * moved
        slopes.append(velocity(point, t + time * h))
    return point, slopes


def _first_step(
    velocity: VectorVelocity, x: Tensor, t: Tensor, slope: Tensor, direction: float, atol: float, rtol: float
) -> Tensor:
    """A first step by the sizes of the state, its slope and the slope's change (Hairer et al. I, section II.4)."""
    scale = atol + rtol * x.abs()
    d0, d1 = _norm(x / scale), _norm(slope / scale)
    small = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = torch.where(small, 1e-6, 0.01 * d0 / d1.clamp(min=1e-30))
    ahead = velocity(x + _each(direction * h0, x) * slope, t + direction * h0)
    d2 = _norm((ahead - slope) / scale) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(largest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / largest.clamp(min=1e-30)) ** (1 / ORDER))
    return torch.minimum(100 * h0, h1)


def _norm(values: Tensor) -> Tensor:
    """Root mean square of each sample, float64 [B]."""
    return values.flatten(1).double().square().mean(1).sqrt()


def _each(factor_B: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], in the state's dtype unless it is bool."""
    factor = factor_B.reshape(-1, *[1] * (like.ndim - 1))
    return factor if factor.dtype == torch.bool else factor.to(like.dtype)
