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
# Seeds are below 2**32: the keys of permutations within classes and within groups of blocks lie above.
CLASS_KEY, GROUP_KEY = 1 << 32, 1 << 48


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
        if self.shuffle == "block":
            mixed = [np.concatenate(group) for group in self.block_groups(epoch)]
            keys = [self.seed + GROUP_KEY * (1 + group) for group in range(len(mixed))]
            shuffled = [rows[permutation(key, epoch, len(rows))] for key, rows in zip(keys, mixed, strict=True)]
            return np.concatenate(shuffled)[: self.length]
        rows_M = self._balanced(epoch) if self.balanced else self.rows_M
        if self.shuffle == "global":
            rows_M = rows_M[permutation(self.seed, epoch, len(rows_M))]
        return rows_M[: self.length]

    def block_groups(self, epoch: int) -> list[list[np.ndarray]]:
        """Blocks of ascending rows in the order of this epoch, grouped as the block shuffle mixes them."""
        rows_M = self._balanced(epoch) if self.balanced else self.rows_M
        starts = permutation(self.seed, epoch, -(-len(rows_M) // self.block_size)) * self.block_size
        blocks = [rows_M[start : start + self.block_size] for start in starts.tolist()]
        return [blocks[group : group + BLOCKS_MIXED] for group in range(0, len(blocks), BLOCKS_MIXED)]

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
