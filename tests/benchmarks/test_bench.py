"""`make bench`: each benchmark a process with a limit, and nothing of it left when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest

PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def bench(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = script("bench")
    monkeypatch.setattr(module, "HERE", tmp_path)
    (tmp_path / "parent.py").write_text(PARENT)
    return module


@pytest.mark.parametrize(("sleeps", "limit_s", "outcome"), [(100, 6.0, "cut off after 6 s"), (0, 60.0, "done in")])
def test_processes_of_a_benchmark_end_with_it(
    bench: ModuleType, tmp_path: Path, sleeps: int, limit_s: float, outcome: str
) -> None:
    """A benchmark cut off left its worker training, beside the next benchmark."""
    one = bench.Bench("parent", f"{{out}}/child.pid {sleeps}", "", limit_s)
    assert bench.run(one, tmp_path, short=False).startswith(outcome)
    child = int((tmp_path / "child.pid").read_text())
    until_s = time.monotonic() + 5
    while time.monotonic() < until_s and _runs(child):
        time.sleep(0.05)
    assert not _runs(child)


def test_failures_are_named(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text("raise SystemExit(3)")
    assert bench.run(bench.Bench("parent", "", ""), tmp_path, short=False) == "failed with status 3"


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
