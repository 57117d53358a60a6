"""Learning rate as a function of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

from rae_fast.config import Scheduler
from rae_fast.errors import UserError, nearest

TYPES = ("linear", "cosine", "constant", "wsd")
# Share of the steps between warm-up and end in which wsd decays (Haegele et al., 2024, recommend 20 %).
COOLDOWN_SHARE = 0.2


@dataclass(frozen=True)
class Schedule:
    """Warm-up for `warmup_steps`, decay until `decay_end`, `final` from there on.

    Step k, counted from 0, uses `schedule(k)`:

        k < warmup:      base, or base (k + 1) / warmup if it warms up from zero
        k >= decay_end:  final
        between, with p = (k - warmup) / (decay_end - warmup):
            linear:      base + p (final - base)
            cosine:      final + (base - final) (1 + cos(pi p)) / 2
            wsd:         base for p < 0.8, then linear to final
        constant:        base at all steps after the warm-up
    """

    kind: str
    base: float
    final: float
    warmup_steps: int
    decay_end: int
    from_zero: bool

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step `step`, the first one being 0."""
        if step < self.warmup_steps:
            return self.base * (step + 1) / self.warmup_steps if self.from_zero else self.base
        if self.kind == "constant":
            return self.base
        if step >= self.decay_end:
            return self.final
        progress = (step - self.warmup_steps) / (self.decay_end - self.warmup_steps)
        if self.kind == "cosine":
            return self.final + (self.base - self.final) * (1 + cos(pi * progress)) / 2
        if self.kind == "wsd":
            progress = max(0.0, (progress - (1 - COOLDOWN_SHARE)) / COOLDOWN_SHARE)
        return self.base + progress * (self.final - self.base)


def build_schedule(
    scheduler: Scheduler, *, lr: float, steps_per_epoch: int, total_steps: int | None = None
) -> Callable[[int], float]:
    """The schedule of a `scheduler` section.

    Epochs are converted by `steps_per_epoch`; steps win over epochs. `base_lr` is the optimizer's lr unless given,
    `final_lr` is 0 for wsd and `base_lr` otherwise. Without an end, decay ends with the run for wsd and, as in the
    reference, together with the warm-up for linear and cosine.

    Args:
        scheduler: the section.
        lr: the optimizer's learning rate.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps of the run; needed by wsd without an end.

    Raises:
        UserError: unknown type, or numbers that do not fit together.
    """
    kind = scheduler.type.casefold()
    if kind not in TYPES:
        raise UserError(f"scheduler.type: {scheduler.type!r}{nearest(kind, TYPES)}", f"one of {', '.join(TYPES)}")
    base = lr if scheduler.base_lr is None else scheduler.base_lr
    final = scheduler.final_lr if scheduler.final_lr is not None else 0.0 if kind == "wsd" else base
    warmup = _steps(scheduler.warmup_steps, scheduler.warmup_epochs, steps_per_epoch, 0)
    end = _steps(scheduler.decay_end_steps, scheduler.decay_end_epoch, steps_per_epoch, None)
    if end is None:
        end = total_steps if kind == "wsd" else warmup
    if end is None:
        raise UserError("scheduler.type: wsd without an end", "decay_end_steps, decay_end_epoch or training.max_steps")
    if kind != "constant" and end < warmup:
        raise UserError(
            f"scheduler: decay ends at step {end}, before the warm-up does at step {warmup}",
            "an end after the warm-up",
            "check warmup_steps, warmup_epochs, decay_end_steps and decay_end_epoch",
        )
    if base <= 0 or final < 0:
        raise UserError(f"scheduler: base_lr {base}, final_lr {final}", "positive learning rates")
    return Schedule(kind, base, final, warmup, end, scheduler.warmup_from_zero)


def _steps(steps: int | None, epochs: float | None, steps_per_epoch: int, default: int | None) -> int | None:
    if steps is not None:
        return steps
    return default if epochs is None else int(epochs * steps_per_epoch)
