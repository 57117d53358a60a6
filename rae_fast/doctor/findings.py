"""What a check found, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK, WRONG, SUSPECT, UNKNOWN = "ok", "WRONG", "suspect", "unknown"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at.
        state: ok; WRONG: this alone spoils samples; suspect: unusual, may be meant so; unknown: could not be looked at.
        found: what was found, with numbers.
        mend: what to do about it.
    """

    check: str
    state: str
    found: str
    mend: str = ""

    def line(self, width: int) -> str:
        """As it is printed."""
        text = f"{self.state:<8} {self.check:<{width}}  {self.found}"
        return f"{text}; {self.mend}" if self.mend else text


def tell(findings: Sequence[Finding]) -> str:
    """All lines, and the first thing to mend."""
    width = max(len(finding.check) for finding in findings)
    lines = [finding.line(width) for finding in findings]
    first = next((finding for finding in findings if finding.state == WRONG), None)
    if first is not None:
        return "\n".join([*lines, "", f"First to mend: {first.check}: {first.found}"])
    suspects = [finding.check for finding in findings if finding.state == SUSPECT]
    verdict = f"Nothing is wrong; look at: {', '.join(suspects)}" if suspects else "Nothing is wrong."
    return "\n".join([*lines, "", verdict])
