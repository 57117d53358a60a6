"""How many samples make a micro-batch, a step and an epoch."""

from __future__ import annotations

from dataclasses import dataclass

from rae_fast.config import Training
from rae_fast.errors import UserError
from rae_fast.runtime import Ranks

DEFAULT_MICRO_BATCH = 16  # the reference's, where neither size is given


@dataclass(frozen=True)
class BatchPlan:
    """Samples per rank and micro-step, micro-steps per optimizer step, samples per optimizer step over all ranks."""

    micro_batch: int
    accumulation: int
    global_batch: int


def plan_batches(training: Training, ranks: Ranks) -> BatchPlan:
    """Complete the sizes: global = micro x ranks x accumulation.

    `global_batch_size` is kept for any number of ranks; given with `batch_size`, accumulation follows from the two.

    Raises:
        UserError: the numbers do not divide, or contradict one another.
    """
    micro, total, accumulation = training.batch_size, training.global_batch_size, training.grad_accum_steps
    for key, value in (("batch_size", micro), ("global_batch_size", total), ("grad_accum_steps", accumulation)):
        if value is not None and value < 1:
            raise UserError(f"training.{key} is {value}", "at least 1")
    if total is None:
        micro = micro or DEFAULT_MICRO_BATCH
        return BatchPlan(micro, accumulation, micro * ranks.world * accumulation)
    share = ranks.world * (micro if micro is not None else accumulation)
    if total % share:
        given = f"batch_size {micro}" if micro is not None else f"grad_accum_steps {accumulation}"
        raise UserError(
            f"training.global_batch_size is {total} with training.{given} on {ranks.world} ranks",
            f"a multiple of {share}",
            "change one of them",
        )
    if micro is None:
        return BatchPlan(total // share, accumulation, total)
    derived = total // share
    if accumulation not in (1, derived):
        raise UserError(
            f"training.grad_accum_steps is {accumulation}, but global_batch_size {total} = batch_size {micro} x "
            f"{ranks.world} ranks x {derived}",
            f"grad_accum_steps {derived}, or none given",
        )
    return BatchPlan(micro, derived, total)


def count_steps(training: Training, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: `max_steps` if given, else `epochs`.

    Raises:
        UserError: an epoch has no step.
    """
    if steps_per_epoch < 1:
        raise UserError(
            "an epoch has fewer samples than one optimizer step", "at least as many", "lower training.global_batch_size"
        )
    return training.max_steps if training.max_steps is not None else training.epochs * steps_per_epoch


def checkpoint_interval(training: Training, steps_per_epoch: int) -> int | None:
    """Optimizer steps between checkpoints; None: at the end only."""
    if training.checkpoint_every is not None:
        return max(training.checkpoint_every, 1)
    if training.checkpoint_interval is None:
        return None
    return max(round(training.checkpoint_interval * steps_per_epoch), 1)


def ema_decays(training: Training) -> list[float | str]:
    """`training.ema_decay` as a list; the first one is sampled and evaluated."""
    decay = training.ema_decay
    return list(decay) if isinstance(decay, list | tuple) else [decay]
