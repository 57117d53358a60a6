"""One line of progress with a rate and the time left."""

from __future__ import annotations

import sys
import time

LOG_INTERVAL_S = 10.0
TTY_INTERVAL_S = 0.2


class Progress:
    """Counts units of work and prints them: in place on a terminal, a line every ten seconds elsewhere.

    Args:
        total: how much there is to do.
        unit: what is counted ("images").
        label: what is being done.
        done: work finished by an earlier run; left out of the rate.
        enabled: False on all ranks but the first.
    """

    def __init__(self, total: int, unit: str, label: str, *, done: int = 0, enabled: bool = True) -> None:
        self.total, self.unit, self.label, self.enabled = total, unit, label, enabled
        self.done, self._first = done, done
        self._start_s = self._printed_s = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._facts = ""
        self._shown: tuple[int, str] | None = None

    @property
    def rate(self) -> float:
        """Units a second since this process began."""
        return (self.done - self._first) / max(time.monotonic() - self._start_s, 1e-9)

    def advance(self, n: int = 1, **facts: object) -> None:
        """Count `n` more units; `facts` are shown as key=value behind the rate."""
        self.done += n
        self._facts = "".join(
            f"  {key}={value:.4g}" if isinstance(value, float) else f"  {key}={value}" for key, value in facts.items()
        )
        interval = TTY_INTERVAL_S if self._tty else LOG_INTERVAL_S
        if self.enabled and time.monotonic() - self._printed_s >= interval:
            self._print(end="" if self._tty else "\n")

    def close(self) -> None:
        """Print the last state, if its line is not there yet."""
        if self.enabled and (self._tty or self._shown != (self.done, self._facts)):
            self._print(end="\n")

    def _print(self, end: str) -> None:
        self._printed_s = time.monotonic()
        self._shown = self.done, self._facts
        left_s = (self.total - self.done) / self.rate if self.rate > 0 and self.done < self.total else 0
        line = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}  {self.rate:,.1f}/s  {clock(left_s)} left"
        print(("\r\033[K" if self._tty else "") + line + self._facts, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
