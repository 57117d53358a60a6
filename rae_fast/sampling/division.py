"""Work on numbered items over ranks that never talk to one another: what lies in a folder is all they know.

Rank r does every unit whose number is r modulo the number of ranks, then ends. Rank 0 ends last: it looks at the folder
until everything is there, and does itself what a rank that died has left. An item looks the same whoever makes it, so
two ranks that make the same one do no harm. No rank sits in a collective operation that could run into its timeout.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rae_fast.progress import Progress
from rae_fast.runtime import Ranks
from rae_fast.sampling.folder import cannot_write

POLL_S = 0.5
STALL_S = 300.0  # without a new item for so long, rank 0 takes the others for dead
WRITERS = 4


@dataclass(frozen=True)
class Division:
    """`total` items in units of `unit` consecutive ones, dealt to ranks.

    Attributes:
        total: number of items.
        unit: items that are made together.
        ranks: this rank among all.
        finished: looks up which items are there.
        label: what is being done, for the progress line.
    """

    total: int
    unit: int
    ranks: Ranks
    finished: Callable[[], set[int]]
    label: str
    stall_s: float = STALL_S

    def units(self) -> list[np.ndarray]:
        """All units, int64 arrays of item numbers."""
        return [np.arange(i, min(i + self.unit, self.total)) for i in range(0, self.total, self.unit)]

    def missing(self) -> list[np.ndarray]:
        """This rank's units of which something is missing."""
        return self._missing(self._ours())

    def _ours(self) -> list[np.ndarray]:
        return self.units()[self.ranks.rank :: self.ranks.world]

    def work(self, make: Callable[[np.ndarray], None], wait: Callable[[], None]) -> None:
        """Make what is missing of this rank's units; on rank 0, return when the others' are there too.

        Args:
            make: makes the items of one unit; may return before they are in their place.
            wait: returns when they are.
        """
        missing = self.missing()
        count = sum(map(len, self._ours()))
        done = count - sum(map(len, missing))
        share = "" if self.ranks.world == 1 else f", rank 0 of {self.ranks.world}"
        progress = Progress(count, "images", self.label + share, done=done, enabled=self.ranks.is_main)
        for unit in missing:
            make(unit)
            progress.advance(len(unit))
        wait()
        progress.close()
        if self.ranks.is_main and self.ranks.world > 1:
            self._await_others(make, wait)

    def _missing(self, units: Iterable[np.ndarray]) -> list[np.ndarray]:
        finished = self.finished()
        return [unit for unit in units if not finished.issuperset(unit.tolist())]

    def _await_others(self, make: Callable[[np.ndarray], None], wait: Callable[[], None]) -> None:
        units = self.units()
        missing = self._missing(units)
        left = sum(map(len, missing))
        progress = Progress(self.total, "images", f"{self.label}, waiting for the other ranks", done=self.total - left)
        changed_s, alone = time.monotonic(), False
        while missing:
            if not alone:
                time.sleep(POLL_S)
            missing = self._missing(missing)
            before, left = left, sum(map(len, missing))
            progress.advance(before - left)
            if left < before:
                changed_s, alone = time.monotonic(), False
            elif time.monotonic() - changed_s > self.stall_s:
                if not alone:
                    print(f"nothing new for {self.stall_s:.0f} s: rank 0 goes on with the {left} left", file=sys.stderr)
                alone = True
                # From the end: a rank that is merely slow goes on from the beginning.
                own = missing.pop()
                make(own)
                wait()
                left -= len(own)
                progress.advance(len(own))
        progress.close()


class Writer:
    """Runs what writes files in threads, so that the device need not wait for compression or disk.

    No more than two units are under way, whatever their number.
    """

    def __init__(self, threads: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(threads or min(WRITERS, cores), "write")
        self._units: deque[tuple[list[Future[Any]], Callable[[], None]]] = deque()

    def submit(
        self, tasks: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]], then: Callable[[], None] = lambda: None
    ) -> None:
        """Start (function, arguments) of one unit, then call `then`; waits for the unit before the last.

        `then` is called in this thread, by a later `submit` or `wait`.
        """
        self._units.append(([self._pool.submit(function, *arguments) for function, arguments in tasks], then))
        while len(self._units) > 2:
            self._finish_oldest()

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            UserError: something could not be written.
        """
        while self._units:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        tasks, then = self._units.popleft()
        for task in tasks:
            try:
                task.result()
            except OSError as error:
                raise cannot_write(Path(error.filename or "the folder"), error) from error
        then()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)


def numbered(folder: Path, suffix: str) -> set[int]:
    """Numbers of the files `<number><suffix>` in a folder; empty where there is no folder."""
    if not folder.is_dir():
        return set()
    stems = (name.removesuffix(suffix) for name in os.listdir(folder) if name.endswith(suffix))  # noqa: PTH208
    return {int(stem) for stem in stems if stem.isdigit()}
