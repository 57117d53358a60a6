"""Errors meant for the person at the keyboard: what was found, what was expected, how to mend it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. Tools print it as one line and exit with status 2, without a traceback.

    Args:
        found: what is wrong, with the file, key and value.
        expected: what would have been right.
        mend: what to do about it.
    """

    def __init__(self, found: str, expected: str = "", mend: str = "") -> None:
        self.found, self.expected, self.mend = found, expected, mend
        parts = [found]
        if expected:
            parts.append(f"expected {expected}")
        if mend:
            parts.append(mend)
        super().__init__(" ".join("; ".join(parts).split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a tool's `main`; turn `UserError` into one line and status 2, Ctrl-C into status 130."""
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader of our output (head, less) went away: not an error of ours, and nothing more to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)
