"""A profiler trace of some steps, on demand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks


def parse_steps(text: str) -> tuple[int, int]:
    """`10..15` -> (10, 15), both included.

    Raises:
        UserError: it is not of that form.
    """
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not found or int(found[1]) > int(found[2]):
        raise UserError(f"runtime.profile is {text!r}", "first..last step, as 10..15")
    return int(found[1]), int(found[2])


class StepTrace:
    """Traces the steps of `runtime.profile` on rank 0 into profile/steps-<first>-<last>.json (chrome://tracing).

    Args:
        steps: as `parse_steps`; None traces nothing.
        folder: the run folder.
        ranks: rank 0 traces.
    """

    def __init__(self, steps: str | None, folder: Path, ranks: Ranks) -> None:
        self.first, self.last = parse_steps(steps) if steps else (0, -1)
        self.path = Path(folder) / "profile" / f"steps-{self.first}-{self.last}.json"
        self._enabled = ranks.is_main and self.last >= self.first
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Call before step `step` (counted from 1)."""
        if not self._enabled or step != self.first:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def after(self, step: int) -> None:
        """Call after step `step`."""
        if self._profiler is None or step < self.last:
            return
        self._profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        self._profiler = None
        print(f"profiler trace: {self.path}", flush=True)
