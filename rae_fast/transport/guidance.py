"""Classifier-free guidance and autoguidance that compute only what is used.

Shapes: B samples, CHW latent. A model is called as model(x_BCHW, t_B, y_B); t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError, nearest

Time = float | Tensor  # one time for the whole batch, or float32 [B]
Velocity = Callable[[Tensor, Time], Tensor]
LabelledModel = Callable[[Tensor, Tensor, Tensor], Tensor]

METHODS = ("cfg", "autoguidance")


def guided_velocity(
    model: LabelledModel,
    *,
    y: Tensor,
    null_label: int,
    scale: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
    method: str = "cfg",
    guide: LabelledModel | None = None,
    scale_at: Callable[[float], float] | None = None,
) -> Velocity:
    """A function (x, t) -> prediction with labels and guidance applied.

    Where t_min <= t <= t_max (both ends included, compared in float32) and scale > 1, the result is

        cfg:           m(x, null) + scale * (m(x, y) - m(x, null))      one forward of 2B rows
        autoguidance:  g(x, y) + scale * (m(x, y) - g(x, y))            B rows of the model, B of the guide

    and m(x, y), B rows, elsewhere (Ho & Salimans 2022; Karras et al. 2024; interval: Kynkaanniemi et al. 2024). With
    t given as a float, which samplers do, nothing is computed that is not used. With t [B] the interval holds per
    sample, as in the reference, and both branches are computed.

    Args:
        model: the generator, in evaluation mode.
        y: int64 [B], class labels.
        null_label: the label that stands for "no class".
        scale: guidance scale; 1 or less is no guidance.
        t_min: lower end of the interval.
        t_max: upper end of the interval.
        method: cfg or autoguidance.
        guide: the weaker model of autoguidance.
        scale_at: guidance scale as a function of t, instead of scale, t_min and t_max.

    Raises:
        UserError: unknown method, autoguidance without a guide, or an empty interval.
    """
    if method not in METHODS:
        raise UserError(f"guidance.method: {method!r}{nearest(method, METHODS)}", f"one of {', '.join(METHODS)}")
    if not t_min <= t_max:
        raise UserError(f"guidance interval from t_min={t_min} to t_max={t_max}", "t_min <= t_max")
    active = scale > 1 or scale_at is not None
    if active and method == "autoguidance" and guide is None:
        raise UserError("guidance.method: autoguidance without a guide", "guidance.guidance_model", "add that section")
    null = torch.full_like(y, null_label)

    def pair(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        if method == "autoguidance":
            assert guide is not None
            return model(x, t_B, y), guide(x, t_B, y)
        both = model(torch.cat([x, x]), torch.cat([t_B, t_B]), torch.cat([y, null]))
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    def velocity(x: Tensor, t: Time) -> Tensor:
        t_B = t if isinstance(t, Tensor) and t.ndim else torch.full_like(y, float(t), dtype=torch.float32)
        if not active:
            return model(x, t_B, y)
        if scale_at is None and t is t_B:
            strong, weak = pair(x, t_B)
            inside = ((t_B >= t_min) & (t_B <= t_max)).reshape(-1, *[1] * (x.ndim - 1))
            return torch.where(inside, weak + scale * (strong - weak), strong)
        first = float(t_B[0]) if t is t_B else float(t)
        current = scale_at(first) if scale_at else scale_in_interval(first, scale, t_min, t_max)
        if current == 1:
            return model(x, t_B, y)
        strong, weak = pair(x, t_B)
        return weak + current * (strong - weak)

    return velocity


def scale_in_interval(t: float, scale: float, t_min: float, t_max: float) -> float:
    """`scale` where t_min <= t <= t_max in float32, 1 elsewhere; the rule of the reference's DiTDH."""
    t32 = np.float32(t)
    return scale if np.float32(t_min) <= t32 <= np.float32(t_max) else 1.0


def scale_outside_pairs(
    t: float, scale: float, pairs: Sequence[tuple[float, float]], interval_scale: float = 1.0
) -> float:
    """The rule of the reference's LightningDiT, for results made with it: `pairs` switch guidance *off*.

    `scale`, but where lo <= t < hi for one of the pairs `interval_scale` if above 1, else 1. Pass it to
    `guided_velocity` as `scale_at`; the whole batch then follows the time of its first sample, as there.
    """
    t32 = np.float32(t)
    if any(np.float32(low) <= t32 < np.float32(high) for low, high in pairs):
        return max(interval_scale, 1.0)
    return scale
