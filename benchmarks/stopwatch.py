"""Times of the parts of a step that is repeated many times, without a wait for the device between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

ON_HOST = "data wait"  # what the host waits for, whatever the device does meanwhile


@dataclass
class Stopwatch:
    """Times of phases over many steps: by CUDA events on a GPU, where nothing waits for them, else by the clock."""

    device: torch.device
    spans: dict[str, list[list[tuple[Any, Any]]]] = field(default_factory=dict)  # phase -> step -> (begin, end)
    steps: int = 0

    def now(self) -> Any:
        """A point in the device's work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter() if phase == ON_HOST else self.now()
        yield
        end = time.perf_counter() if phase == ON_HOST else self.now()
        by_step = self.spans.setdefault(phase, [])
        by_step.extend([] for _ in range(self.steps + 1 - len(by_step)))
        by_step[self.steps].append((begin, end))

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Time every call of a method."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return method(*args, **kwargs)

        setattr(owner, name, timed)

    def milliseconds(self, phase: str) -> list[float]:
        """Of each step; the device must have finished."""
        return [
            sum(map(milliseconds_between, *zip(*spans, strict=True))) for spans in self.spans.get(phase, []) if spans
        ]


def milliseconds_between(begin: Any, end: Any) -> float:
    """Of two points of a stopwatch."""
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)
