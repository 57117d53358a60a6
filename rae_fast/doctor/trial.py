"""What a probe of the machine found. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import dataclass

OK, MISSING, SLOW = "ok", "missing", "slow"
DEMO, CACHE, TRAIN, KERNELS = JOBS = ("demo", "cache", "train", "kernels")


@dataclass(frozen=True)
class Trial:
    """What a probe found.

    Attributes:
        name: what was tried.
        state: ok, missing or slow.
        found: versions, rates, or what went wrong.
        cost: what it costs as it is.
        mend: how to change that.
        stops: jobs that cannot run without it.
    """

    name: str
    state: str
    found: str
    cost: str = ""
    mend: str = ""
    stops: tuple[str, ...] = ()
