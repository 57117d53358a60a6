"""Which class each generated image gets; a function of the counts and the seed, whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import torch

from rae_fast.errors import UserError, nearest

SAMPLINGS = ("equal", "random")


def draw_labels(sampling: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels int64 [count] of images 0, 1, ..., by `equal` or `random`.

    Raises:
        UserError: unknown sampling, or a count that equal classes do not divide.
    """
    if sampling not in SAMPLINGS:
        raise UserError(f"label sampling {sampling!r}{nearest(sampling, SAMPLINGS)}", f"one of {', '.join(SAMPLINGS)}")
    return equal_labels(count, num_classes, seed) if sampling == "equal" else random_labels(count, num_classes, seed)


def equal_labels(count: int, num_classes: int, seed: int, *, total: int | None = None) -> np.ndarray:
    """Every class `count / num_classes` times in the reference's order, then random classes up to `total`.

    Returns:
        int64 [total or count].

    Raises:
        UserError: `count` is not a multiple of `num_classes`.
    """
    if count % num_classes:
        raise UserError(
            f"Equal label sampling requires num_fid_samples ({count}) to be divisible by num_classes ({num_classes}).",
            mend="choose another number of images, or random labels",
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat_interleave(count // num_classes)
    labels = labels[torch.randperm(count, generator=generator)]
    rest = torch.randint(0, num_classes, ((total or count) - count,), generator=generator)
    return torch.cat([labels, rest]).numpy()


def random_labels(count: int, num_classes: int, seed: int) -> np.ndarray:
    """Classes drawn independently, int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_classes, (count,), generator=generator).numpy()


def reference_labels(count: int, num_classes: int, seed: int, *, world: int, batch_size: int) -> np.ndarray:
    """Labels of 000000.png, 000001.png, ... as the reference's sample_ddp.py gives them on `world` GPUs.

    There each rank takes a contiguous part of the label order, while file numbers go round the ranks, so that the
    class of a file depends on the number of GPUs; here it does not.

    Returns:
        int64 [count rounded up to whole global batches].
    """
    steps = -(-count // (world * batch_size))
    labels = equal_labels(count, num_classes, seed, total=steps * world * batch_size)
    return labels.reshape(world, steps, batch_size).transpose(1, 2, 0).reshape(-1)
