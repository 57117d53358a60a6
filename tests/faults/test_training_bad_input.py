from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["training.max_stesp=3"], "unknown key training.max_stesp (did you mean 'max_steps'?)"),
        (["misc.latent_size=[8,4,4]", "cache.path=/no/such/store"], "no latent store at /no/such/store"),
        (["misc.latent_size=[8,4,4]", "stage_2.params.input_size=3"], "stage_2.params.input_size is 3"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, found, tmp_path):
    tool = [sys.executable, str(REPOSITORY / "tools/train_dit.py"), "stage_1.params.encoder_input_size=56"]
    run = [f"logging.run_folder={tmp_path / 'run'}", "runtime.device=cpu"]
    done = subprocess.run([*tool, *run, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert found in lines[0]
    assert not (tmp_path / "run").exists()
