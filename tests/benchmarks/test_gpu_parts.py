"""The parts of `make gpu`: what cannot run is named, a step that takes too long is ended, nothing stops the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parts(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on a machine that seems to have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return script("gpu_parts")


def run(parts: ModuleType, monkeypatch: pytest.MonkeyPatch, results: Path, *steps: object) -> list[str]:
    monkeypatch.setitem(parts.PARTS, 1, ("a part", steps))
    return parts.run_part(1, results)


def script_of(folder: Path, text: str) -> str:
    (folder / "step.py").write_text(text)
    return str(folder / "step.py")


def test_steps_run_from_the_root_with_both_packages_and_leave_their_output(
    parts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = script_of(tmp_path, "import os, sys, rae_fast, rae_kernels\nprint(os.getcwd(), sys.argv[1])\n")
    fails = parts.Step("fails", "-c raise(SystemExit(3))")
    outcomes = run(parts, monkeypatch, tmp_path, fails, parts.Step("runs", command + " {results}/x.json"))
    assert outcomes == ["failed with status 3", "done"]
    log = (tmp_path / "gpu-part-1.log").read_text()
    assert f"{ROOT} {tmp_path}/x.json" in log and log.endswith("runs: done\n")
    assert "part 1, fails: failed with status 3" in capfd.readouterr().out


def test_a_step_is_ended_at_its_limit_with_its_children_and_the_next_one_runs(
    parts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parts, "LEAST_S", 0.0)
    text = "import subprocess, sys\nprint('found', flush=True)\nsubprocess.run([sys.executable, '-c', 'input()'])\n"
    slow = parts.Step("slow", script_of(tmp_path, text.replace("input()", "import time; time.sleep(60)")), limit_s=8.0)
    outcomes = run(parts, monkeypatch, tmp_path, slow, parts.Step("next", "-c pass"))
    assert outcomes == ["cut off after 8 s", "done"]
    assert "found\n" in (tmp_path / "gpu-part-1.log").read_text()


def test_a_part_does_not_begin_what_it_has_no_time_for(
    parts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parts, "PART_S", 1.0)
    assert run(parts, monkeypatch, tmp_path, parts.Step("late", "-c pass")) == [
        "cut off before it began: the part's time is over"
    ]


def test_missing_packages_and_a_missing_gpu_are_named(
    parts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = parts.Step("needy", "-c raise(SystemExit(1))", ("torch", "no_such_package", "no_such.part"))
    assert run(parts, monkeypatch, tmp_path, step) == ["skipped, not installed: no_such_package, no_such.part"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(parts, monkeypatch, tmp_path, step) == ["skipped, torch sees no CUDA device"]


def test_every_step_is_a_script_that_is_there_with_options_that_it_has(parts: ModuleType) -> None:
    for _, steps in parts.PARTS.values():
        for step in steps:
            name, *words = step.command.split()
            if name == "-m":
                assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), step.name
                continue
            text = (ROOT / name).read_text()
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in text, f"{step.name}: {name} has no {option}"


def test_every_test_marked_gpu_is_in_a_part(parts: ModuleType) -> None:
    chosen = [ROOT / word for _, steps in parts.PARTS.values() for step in steps for word in step.command.split()]
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in file.read_text() and file != Path(__file__):
            assert any(file.is_relative_to(path) for path in chosen if "tests" in path.parts), file
