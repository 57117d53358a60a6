"""Every committed result is in the common form, and the form refuses what a reader could not trust."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def results_file() -> ModuleType:
    """benchmarks/ holds scripts and is no package."""
    spec = importlib.util.spec_from_file_location("results_file", BENCHMARKS / "results_file.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def result(results_file: ModuleType) -> dict[str, Any]:
    rows = [results_file.row("old", [1.0, 2.0, 3.0], "images/s"), results_file.row("new", [4.0], "images/s", ratio=2)]
    return results_file.make_result("decode", "How fast?", "old", rows, threads=2)


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda file: file.name)
def test_committed_results_are_in_the_common_form(results_file: ModuleType, file: Path) -> None:
    result = json.loads(file.read_text())
    results_file.validate_result(result)
    assert (BENCHMARKS / f"{result['benchmark'].split('-')[0]}.py").exists(), "the script that made it"


def test_a_result_is_written_as_it_was_made(results_file: ModuleType, result: dict[str, Any], tmp_path: Path) -> None:
    results_file.write_result(tmp_path / "decode-cpu.json", result)
    assert json.loads((tmp_path / "decode-cpu.json").read_text()) == result
    assert result["threads"] == 2
    assert result["rows"][0] == {"name": "old", "median": 2.0, "p10": 1.2, "p90": 2.8, "unit": "images/s", "n": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("cpu"), "cpu is None"),
        (lambda r: r.update(question=""), "question is ''"),
        (lambda r: r.update(date="yesterday"), "isoformat"),
        (lambda r: r.update(versions={}), "torch"),
        (lambda r: r.update(rows=[]), "rows is empty"),
        (lambda r: r.update(baseline="none"), "baseline 'none' is none of the rows"),
        (lambda r: r["rows"][0].pop("p90"), "lacks p90"),
        (lambda r: r["rows"][0].update(p90=0.5), "p10 <= median <= p90"),
        (lambda r: r["rows"][0].update(median="2"), "must be numbers"),
        (lambda r: r["rows"][1].update(name="old"), r"rows share a name: \['old'\]"),
        (lambda r: r["rows"][0].update(p90=float("inf")), "JSON compliant"),
        (lambda r: r["rows"][0].update(n=0), "n must be 1 or more"),
    ],
)
def test_what_a_reader_could_not_trust_is_refused(
    results_file: ModuleType, result: dict[str, Any], change: Any, message: str
) -> None:
    damaged = copy.deepcopy(result)
    change(damaged)
    with pytest.raises(ValueError, match=message):
        results_file.validate_result(damaged)


def test_no_measurements_make_no_row(results_file: ModuleType) -> None:
    with pytest.raises(ValueError, match="new: no measurements"):
        results_file.row("new", [], "images/s")
