"""Reading ahead of a block shuffle: while one group of blocks is served, the disk already reads the next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rae_fast.latents.order import Order


class ReadAhead:
    """Asks for the group in hand and the one after it, each once, in a thread that may wait for the disk.

    Args:
        order: a block-shuffled order.
        ask: called with (epoch, ascending rows) that will be wanted soon.
    """

    def __init__(self, order: Order, ask: Callable[[int, np.ndarray], None]) -> None:
        self._order, self._ask = order, ask
        self._asked: set[tuple[int, int]] = set()
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._epoch, self._ends = -1, np.zeros(0, np.int64)

    def reach(self, epoch: int, position: int) -> None:
        """Serving has come to `position` of `epoch`."""
        if epoch != self._epoch:
            sizes = [sum(map(len, group)) for group in self._order.block_groups(epoch)]
            self._epoch, self._ends = epoch, np.cumsum(sizes)
        group = int(np.searchsorted(self._ends, position, side="right"))
        following = (epoch, group + 1) if group + 1 < len(self._ends) else (epoch + 1, 0)
        for wanted in ((epoch, group), following):
            if wanted not in self._asked:
                self._asked.add(wanted)
                self._pool.submit(self._ask_group, *wanted)
        self._asked = {(epoch, group), following}

    def _ask_group(self, epoch: int, group: int) -> None:
        for rows in self._order.block_groups(epoch)[group]:
            self._ask(epoch, rows)
