"""Every fault of the reference in docs/reference_faults.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (\d+) \|(.*)\|$", (REPOSITORY / "docs/reference_faults.md").read_text(), re.MULTILINE)


def test_all_faults_are_listed_once():
    assert [int(number) for number, _ in ROWS] == list(range(1, 34))


@pytest.mark.parametrize(("number", "text"), ROWS, ids=[number for number, _ in ROWS])
def test_fault_has_tests(number, text):
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert named, f"fault {number} names no test"
    for path, test in named:
        assert f"def {test}(" in (REPOSITORY / path).read_text(), f"{path} has no {test}"
