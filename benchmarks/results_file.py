"""The one form of all benchmark results: what was asked, on what machine, against which baseline, with quantiles.

Run from the repository's root (`python benchmarks/<name>.py`), so that Python finds this file beside its caller.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rae_fast.provenance import versions, write_json

RESULTS = Path(__file__).parent / "results"
TEXTS = ("benchmark", "question", "device", "cpu", "date", "commit", "baseline")
ROW_NUMBERS = ("median", "p10", "p90")
ROW_KEYS = ("name", "unit", "n", *ROW_NUMBERS)


def device_facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The device a result was measured on, and the CPU beside it with the threads that torch uses."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "cpu": f"{_cpu_name()}, {torch.get_num_threads()} torch threads"}


def row(name: str, samples: Sequence[float], unit: str, **facts: Any) -> dict[str, Any]:
    """One line of a result: median, 10 % and 90 % quantiles of repeated measurements, and further facts.

    Raises:
        ValueError: there are no samples.
    """
    if not len(samples):
        raise ValueError(f"{name}: no measurements")
    p10, median, p90 = (float(f"{value:.6g}") for value in np.quantile(np.asarray(samples, float), (0.1, 0.5, 0.9)))
    return {"name": name, "median": median, "p10": p10, "p90": p90, "unit": unit, "n": len(samples), **facts}


def make_result(
    benchmark: str,
    question: str,
    baseline: str,
    rows: Sequence[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    **facts: Any,
) -> dict[str, Any]:
    """A whole result.

    Args:
        benchmark: the script's name.
        question: what it answers, as a sentence.
        baseline: name of the row that the others are compared with.
        rows: made by `row`.
        device: what was measured.
        facts: settings that matter (sizes, threads, batch).
    """
    result = {
        "benchmark": benchmark,
        "question": question,
        **device_facts(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "baseline": baseline,
        **facts,
        "rows": [dict(entry) for entry in rows],
    }
    validate_result(result)
    return result


def write_result(path: str | Path, result: Mapping[str, Any]) -> None:
    """Check a result and write it, atomically.

    Raises:
        ValueError: it is not in the common form.
    """
    validate_result(result)
    write_json(path, result)


def validate_result(result: Any) -> None:
    """Check that a result is in the common form.

    Raises:
        ValueError: what is wrong, and where.
    """
    if not isinstance(result, Mapping):
        raise ValueError("a result is an object")
    for key in TEXTS:
        if not isinstance(result.get(key), str) or not result[key]:
            raise ValueError(f"{key} is {result.get(key)!r}, expected a text")
    datetime.date.fromisoformat(result["date"])
    if not isinstance(result.get("versions"), Mapping) or "torch" not in result["versions"]:
        raise ValueError("versions must name torch's at least")
    rows = result.get("rows")
    if not isinstance(rows, Sequence) or not rows:
        raise ValueError("rows is empty")
    for entry in rows:
        _validate_row(entry)
    names = [entry["name"] for entry in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"rows share a name: {sorted(name for name in set(names) if names.count(name) > 1)}")
    if result["baseline"] not in names:
        raise ValueError(f"baseline {result['baseline']!r} is none of the rows {names}")
    json.dumps(result, allow_nan=False)


def _validate_row(entry: Any) -> None:
    missing = [key for key in ROW_KEYS if not isinstance(entry, Mapping) or key not in entry]
    if missing:
        raise ValueError(f"row {entry!r} lacks {', '.join(missing)}")
    if not all(isinstance(entry[key], int | float) and not isinstance(entry[key], bool) for key in (*ROW_NUMBERS, "n")):
        raise ValueError(f"row {entry['name']!r}: median, p10, p90 and n must be numbers")
    if not entry["p10"] <= entry["median"] <= entry["p90"]:
        raise ValueError(f"row {entry['name']!r}: p10 <= median <= p90 does not hold")
    if entry["n"] < 1 or not isinstance(entry["unit"], str) or not entry["unit"]:
        raise ValueError(f"row {entry['name']!r}: n must be 1 or more and unit a text")


def print_table(result: Mapping[str, Any]) -> None:
    """The rows of a result as aligned text, with each median over the baseline's."""
    baseline = next(entry for entry in result["rows"] if entry["name"] == result["baseline"])
    print(f"{result['question']}\n{result['device']}; {result['cpu']}; commit {result['commit']}")
    width = max(len(entry["name"]) for entry in result["rows"])
    print(f"{'':{width}}  {'median':>10} {'p10':>10} {'p90':>10}  {'of baseline':>11}")
    for entry in result["rows"]:
        share = f"{entry['median'] / baseline['median']:.2f}x" if entry["unit"] == baseline["unit"] else ""
        figures = " ".join(f"{entry[key]:>10.4g}" for key in ROW_NUMBERS)
        print(f"{entry['name']:{width}}  {figures}  {share:>11}  {entry['unit']}")


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the checked-out commit, `+` behind it if files differ from it."""
    root = Path(__file__).parents[1]
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
