from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rae_fast.config_file import load_config
from rae_fast.shipped import shipped, tools

RAE_FAST = Path(sys.executable).parent / "rae-fast"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RAE_FAST, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_without_a_tool_all_of_them_are_listed_with_a_sentence(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 0
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()[2:]]
    assert {name for name, _ in lines} == set(tools())
    assert all(sentence for _, sentence in lines)


def test_a_tool_runs_as_its_file_does_from_any_folder(tmp_path: Path) -> None:
    done = run("inspect-cache", "info", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no latent store at nowhere;")
    assert run("sample", "--help", cwd=tmp_path).stdout.startswith("usage: rae-fast sample")


def test_an_unknown_tool_is_one_line_with_the_nearest(tmp_path: Path) -> None:
    done = run("bild-cache", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "did you mean 'build-cache'" in done.stderr


def test_recipes_are_found_from_any_folder_unless_the_user_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.yaml", []).misc.time_dist_shift_base > 0
    own = Path("configs/demo.yaml")
    own.parent.mkdir()
    own.write_text("training: {epochs: 7}")
    assert shipped(own) == own
    assert load_config(own, []).training.epochs == 7
