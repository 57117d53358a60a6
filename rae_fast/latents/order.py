"""Which rows an epoch visits, and in which order: a pure function of (seed, epoch).

Shapes: M rows to choose from, E images in an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rae_fast.errors import UserError
from rae_fast.rng import permutation

BLOCKS_MIXED = 8  # blocks that are shuffled together: a batch mixes this many places of the disk
CLASS_KEY = 1 << 32  # seeds are below 2**32: the keys of the classes' own permutations lie above


@dataclass(frozen=True)
class Order:
    """The order of every epoch.

    Attributes:
        rows_M: int64 [M], ascending, the rows to choose from.
        labels_M: their classes, needed by `balanced`.
        seed: key of all permutations.
        shuffle: "global", "block" (whole blocks in random order, mixed eight at a time) or "none".
        block_size: rows in a block.
        balanced: every class equally often.
        multiple: an epoch is cut to a multiple of this, the images of one optimizer step.
    """

    rows_M: np.ndarray
    labels_M: np.ndarray
    seed: int = 0
    shuffle: str = "global"
    block_size: int = 4096
    balanced: bool = False
    multiple: int = 1

    @property
    def length(self) -> int:
        """Images in an epoch, a multiple of `multiple`."""
        count = self._share * len(self._classes) if self.balanced else len(self.rows_M)
        return count // self.multiple * self.multiple

    @cached_property
    def _classes(self) -> np.ndarray:
        return np.unique(self.labels_M)

    @property
    def _share(self) -> int:
        """Images of each class in an epoch, when they come equally often."""
        return len(self.rows_M) // len(self._classes)

    def epoch(self, epoch: int) -> np.ndarray:
        """Rows in the order of this epoch, int64 [E]."""
        rows_M = self._balanced(epoch) if self.balanced else self.rows_M
        if self.shuffle == "global":
            rows_M = rows_M[permutation(self.seed, epoch, len(rows_M))]
        elif self.shuffle == "block":
            rows_M = rows_M[self._blocks(epoch, len(rows_M))]
        return rows_M[: self.length]

    def _blocks(self, epoch: int, count: int) -> np.ndarray:
        """Positions 0..count-1, block after block in random order, shuffled within each group of eight blocks."""
        blocks = permutation(self.seed, epoch, -(-count // self.block_size))
        starts = blocks * self.block_size
        parts = []
        for group in range(0, len(starts), BLOCKS_MIXED):
            inside = [
                np.arange(start, min(start + self.block_size, count)) for start in starts[group : group + BLOCKS_MIXED]
            ]
            mixed = np.concatenate(inside)
            parts.append(mixed[permutation(self.seed + CLASS_KEY * (1 + group), epoch, len(mixed))])
        return np.concatenate(parts)

    def _balanced(self, epoch: int) -> np.ndarray:
        """Equally many rows of each class, ascending.

        A class is an endless sequence of permutations of its rows, of which each epoch takes the next share: so over
        epochs all of its images come equally often.
        """
        wanted = np.arange(epoch * self._share, (epoch + 1) * self._share)
        chosen = []
        for label in self._classes.tolist():
            members = self.rows_M[self.labels_M == label]
            for turn in np.unique(wanted // len(members)).tolist():
                shuffled = members[permutation(self.seed + CLASS_KEY * (label + 1), turn, len(members))]
                chosen.append(shuffled[wanted[wanted // len(members) == turn] % len(members)])
        return np.sort(np.concatenate(chosen), kind="stable")


def choose_rows(
    labels_N: np.ndarray, valid_N: np.ndarray, classes: Sequence[int] | None = None, where: str = "the store"
) -> np.ndarray:
    """Rows that may be served: valid, and of the wanted classes; int64 [M], ascending.

    Raises:
        UserError: no row is left.
    """
    keep = valid_N.copy()
    if classes is not None:
        keep &= np.isin(labels_N, np.asarray(list(classes)))
    rows = np.flatnonzero(keep)
    if not len(rows):
        asked = "" if classes is None else f" of loader.classes {list(classes)}"
        raise UserError(f"{where} has no valid image{asked}", "at least one", "choose other classes")
    return rows
