"""Who is waiting for what, when a run stands still.

Each rank's thread keeps a small file up to date that says at which step and in which phase it is. When no step has
ended for too long, the thread of each machine's first rank reads all of them and prints one line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from rae_fast.provenance import write_json
from rae_fast.runtime import Ranks

WRITE_INTERVAL_S = 5.0


class Heartbeat:
    """This rank's sign of life.

    Args:
        folder: the run folder, which all ranks see.
        ranks: this process among all.
        stall_s: report when no step has ended for so long; compilation makes the first one slow.
        interval_s: between writes of the file.
    """

    def __init__(self, folder: Path, ranks: Ranks, stall_s: float, interval_s: float = WRITE_INTERVAL_S) -> None:
        self.folder, self.ranks, self.stall_s, self.interval_s = Path(folder) / ".ranks", ranks, stall_s, interval_s
        self.step, self.phase = 0, "starting"
        self._step_s = self._phase_s = time.time()
        self._stopping = threading.Event()
        self._reported_step: int | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._path(self.ranks.rank).unlink(missing_ok=True)

    def enter(self, phase: str) -> None:
        """Say what is being done from now on."""
        self.phase, self._phase_s = phase, time.time()

    def stepped(self, step: int) -> None:
        """Say that a step has ended."""
        self.step, self._step_s = step, time.time()

    def report(self) -> str:
        """One line: for each group of ranks in the same place, which step and phase, and since when."""
        now_s = time.time()
        places: dict[tuple[int, str], list[tuple[int, float]]] = {}
        for rank in range(self.ranks.world):
            try:
                facts = json.loads(self._path(rank).read_text())
                place = (facts["step"], facts["phase"])
                if now_s - facts["written"] > 3 * self.interval_s + 1:
                    place = (facts["step"], f"gone silent in {facts['phase']}")
            except (OSError, ValueError, KeyError):
                facts, place = {"since": now_s}, (-1, "gone")
            places.setdefault(place, []).append((rank, now_s - facts["since"]))
        # The smallest group is the one that the others wait for.
        groups = sorted(places.items(), key=lambda group: len(group[1]))
        parts = []
        for (step, phase), members in groups:
            names = ", ".join(str(rank) for rank, _ in members[:8]) + (", ..." if len(members) > 8 else "")
            longest_s = max(waited_s for _, waited_s in members)
            parts.append(f"rank {names}: {phase} (step {step}) for {longest_s:.0f} s")
        return f"no step has ended for {now_s - self._step_s:.0f} s; " + "; ".join(parts)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _run(self) -> None:
        while True:
            now_s = time.time()
            write_json(
                self._path(self.ranks.rank),
                {"step": self.step, "phase": self.phase, "since": self._phase_s, "written": now_s},
            )
            stalled = now_s - self._step_s > self.stall_s and self._reported_step != self.step
            if stalled and self.ranks.local_rank == 0:
                self._reported_step = self.step
                print(self.report(), file=sys.stderr, flush=True)
            if self._stopping.wait(self.interval_s):
                return
