"""Running averages of the weights.

Two profiles, both as theta_ema <- beta * theta_ema + (1 - beta) * theta after every optimizer step:

    exponential  beta constant
    power        beta(t) = (1 - 1/t)^(gamma + 1) at step t = 1, 2, ...: the weight of step tau in the average at step t
                 is proportional to tau^gamma, so the average spans a constant share sigma_rel of the training so far
                 (Karras et al., EDM2, 2024, eq. 1, 2 and 126)

Stored power averages of two or more gammas give the average of any other length afterwards: `reconstruct`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn

from rae_fast.errors import UserError

POWER = "power_"
# sigma_rel of gamma = 0, the longest average that is not flat; longer ones do not exist.
LONGEST_SIGMA_REL = sqrt(1 / 12)


@dataclass(frozen=True)
class Profile:
    """One running average: a constant beta, or a power function's gamma."""

    label: str
    beta: float | None = None
    gamma: float | None = None

    @classmethod
    def parse(cls, decay: float | str) -> Profile:
        """A number below 1, or `power_<sigma_rel>` as power_0.05.

        Raises:
            UserError: neither of them, or out of range.
        """
        text = str(decay)
        try:
            value = float(text.removeprefix(POWER))
        except ValueError:
            value = -1.0
        if text.startswith(POWER) and 0 < value <= LONGEST_SIGMA_REL:
            return cls(text, gamma=gamma_of_sigma_rel(value))
        if not text.startswith(POWER) and 0 <= value < 1:
            return cls(text, beta=value)
        raise UserError(
            f"training.ema_decay: {decay!r}",
            f"a number from 0 to 1, or {POWER}<sigma_rel> up to {LONGEST_SIGMA_REL:.3f}",
        )

    @property
    def sigma_rel(self) -> float | None:
        """Relative width of a power average."""
        return None if self.gamma is None else sigma_rel_of_gamma(self.gamma)

    def beta_at(self, step: int | None) -> float:
        """beta of optimizer step `step`, counted from 1."""
        if self.beta is not None:
            return self.beta
        assert self.gamma is not None and step is not None and step >= 1
        return (1 - 1 / step) ** (self.gamma + 1)


class FlatEMA:
    """Running averages of a list of float32 tensors, as ZeRO's flat master weights.

    Args:
        masters: the tensors; the averages start as copies of them.
        decays: one average for each, see `Profile.parse`; the first one is the default.

    Attributes:
        labels: the decays as strings.
    """

    def __init__(self, masters: Sequence[Tensor], decays: Sequence[float | str]) -> None:
        self.profiles = [Profile.parse(decay) for decay in decays]
        self.labels = [profile.label for profile in self.profiles]
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f"training.ema_decay: {list(decays)}", "different decays")
        self.averages = {label: [master.detach().clone() for master in masters] for label in self.labels}

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], *, keep: Tensor | None = None, step: int | None = None) -> None:
        """Move every average towards `masters`; no host synchronization.

        Args:
            masters: as given to the constructor.
            keep: 0-d tensor, 1 or 0; 0 leaves the averages as they are (a skipped optimizer step).
            step: optimizer steps made so far, this one included; power profiles need it.
        """
        for profile in self.profiles:
            amount = 1 - profile.beta_at(step)
            averages = self.averages[profile.label]
            targets = [master.detach() for master in masters]
            if keep is None:
                torch._foreach_lerp_(averages, targets, amount)
            else:
                torch._foreach_lerp_(averages, targets, [keep.to(torch.float32) * amount] * len(averages))

    def shards(self, label: float | str | None = None) -> list[Tensor]:
        """The live tensors of one average, by its decay; the first one if None.

        Raises:
            UserError: no such average.
        """
        wanted = self.labels[0] if label is None and self.labels else str(label)
        if wanted not in self.averages:
            raise UserError(f"EMA decay {wanted}", f"one of {', '.join(self.labels) or 'none: no EMA is kept'}")
        return self.averages[wanted]


class EMA:
    """Running averages of a module's named parameters; buffers are not averaged, as in the reference.

    Args:
        module: whose parameters; those without `requires_grad` are left out.
        decays: see `FlatEMA`.
    """

    def __init__(self, module: nn.Module, decays: Sequence[float | str]) -> None:
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.flat = FlatEMA(self._parameters(module), decays)

    def _parameters(self, module: nn.Module) -> list[Tensor]:
        parameters = dict(module.named_parameters())
        return [parameters[name].data for name in self.names]

    def update(self, module: nn.Module, *, keep: Tensor | None = None, step: int | None = None) -> None:
        """Move every average towards the module's parameters."""
        self.flat.update(self._parameters(module), keep=keep, step=step)

    def weights(self, label: float | str | None = None) -> dict[str, Tensor]:
        """One average by parameter name, live; the first one if None."""
        return dict(zip(self.names, self.flat.shards(label), strict=True))

    @torch.no_grad()
    def copy_to(self, module: nn.Module, label: float | str | None = None) -> None:
        """Write one average into a module's parameters."""
        parameters = dict(module.named_parameters())
        for name, value in self.weights(label).items():
            parameters[name].copy_(value)


def sigma_rel_of_gamma(gamma: float) -> float:
    """Standard deviation of the power profile over the training so far: sqrt((g+1) / ((g+2)^2 (g+3)))."""
    return sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of_sigma_rel(sigma_rel: float) -> float:
    """The gamma >= 0 whose profile has that relative width: the positive root of
    g^3 + 7 g^2 + (16 - s) g + (12 - s) with s = sigma_rel^-2.
    """
    s = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return max(float(root.real) for root in roots)


def profile_product(gamma_a: float, step_a: float, gamma_b: float, step_b: float) -> float:
    """Inner product of two power profiles p(tau) = (g + 1) tau^g / t^(g+1) on 0 < tau <= t."""
    least, most = min(step_a, step_b), max(step_a, step_b)
    later_gamma = gamma_a if step_a >= step_b else gamma_b
    ratio = (least / most) ** later_gamma / most
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio


def reconstruction_weights(
    stored: Sequence[tuple[float, int]], sigma_rel: float, step: int | None = None
) -> np.ndarray:
    """Least-squares weights of stored averages for the average of width `sigma_rel` at `step`; float64, sum 1 or so.

    Args:
        stored: (sigma_rel, step) of each stored power average.
        sigma_rel: width wanted.
        step: at which step; None: the last one stored.

    Raises:
        UserError: nothing stored, or the wanted step is after the last stored one.
    """
    if not stored:
        raise UserError("no stored power averages", f"checkpoints of ema_decay: [{POWER}0.05, {POWER}0.1]")
    gammas, steps = [gamma_of_sigma_rel(s) for s, _ in stored], [float(t) for _, t in stored]
    wanted = float(max(steps) if step is None else step)
    if wanted > max(steps):
        raise UserError(f"an average at step {step}", f"a step up to the last stored one, {max(steps):.0f}")
    target = gamma_of_sigma_rel(sigma_rel)
    products = [
        [profile_product(a, s, b, t) for b, t in zip(gammas, steps, strict=True)]
        for a, s in zip(gammas, steps, strict=True)
    ]
    right = [profile_product(a, s, target, wanted) for a, s in zip(gammas, steps, strict=True)]
    return np.linalg.lstsq(np.array(products), np.array(right), rcond=None)[0]


def reconstruct(
    stored: Sequence[tuple[float, int, Callable[[], Mapping[str, Tensor]]]],
    sigma_rel: float,
    step: int | None = None,
) -> dict[str, Tensor]:
    """The average of width `sigma_rel` from stored power averages (EDM2, section 3.1), in the tensors' dtypes.

    Args:
        stored: (sigma_rel, step, reader of its weights) of each stored average; one at a time is in memory.
        sigma_rel: width wanted.
        step: at which step; None: the last one stored.

    Raises:
        UserError: see `reconstruction_weights`.
    """
    amounts = reconstruction_weights([(s, t) for s, t, _ in stored], sigma_rel, step)
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for amount, (_, _, read) in zip(amounts, stored, strict=True):
        for name, value in read().items():
            dtypes[name] = value.dtype
            share = float(amount) * value.to(torch.float64)
            total[name] = share if name not in total else total[name] + share
    return {name: value.to(dtypes[name]) for name, value in total.items()}
