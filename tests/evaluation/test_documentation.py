"""docs/evaluation.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from rae_fast.evaluation.outcome import TITLES

TEXT = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text()


def test_every_figure_of_a_report_is_explained() -> None:
    rows = "\n".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `"))
    assert set(TITLES) <= set(re.findall(r"`(\w+)`", rows))


def test_every_line_of_the_doctor_is_explained() -> None:
    folder = Path(__file__).resolve().parents[2] / "rae_fast/doctor"
    checks = {
        name
        for file in ("evidence", "settings", "weights", "latents", "denoising")
        for name in re.findall(r'Finding\(\s*"([\w ]+)"', (folder / f"{file}.py").read_text())
    }
    section = TEXT[TEXT.index("## My samples are noise") : TEXT.index("## Messages")]
    named = {
        name.strip() for line in section.splitlines() if line.startswith("|") for name in line.split("|")[1].split(",")
    }
    assert checks and checks <= named
