"""The times at which samplers evaluate a model.

They are Python floats, known before the first step, so that fixed-step methods never wait for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError, nearest
from rae_fast.transport.objective import shift_time

GRIDS = ("reference", "full")
INTERVAL = (0.0, 0.999)  # of 1 - t: the reference's span for velocities


def time_grid(
    num_steps: int, grid: str = "reference", shift: float = 1.0, interval: tuple[float, float] = INTERVAL
) -> list[float]:
    """Decreasing times of an integration.

    reference: 1 - linspace(*interval, num_steps): num_steps - 1 steps, ending short of t = 0.
    full: num_steps + 1 times from 1 - interval[0] to exactly 0: num_steps steps.
    Both are then shifted.

    Raises:
        UserError: unknown grid, or too few steps for it.
    """
    if grid not in GRIDS:
        raise UserError(f"sampler.params.grid: {grid!r}{nearest(grid, GRIDS)}", f"one of {', '.join(GRIDS)}")
    least = 2 if grid == "reference" else 1
    if num_steps < least:
        raise UserError(f"sampler.params.num_steps: {num_steps}", f"{least} or more with grid: {grid}")
    low, high = interval
    even = np.linspace(low, high, num_steps) if grid == "reference" else np.linspace(low, 1.0, num_steps + 1)
    return [float(shift_time(t, shift)) for t in 1.0 - even]


def scalar(t: float) -> Tensor:
    """t as a 0-d CPU tensor: combines with tensors of any device without synchronization."""
    return torch.tensor(t, dtype=torch.float64)
