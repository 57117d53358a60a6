"""The benchmark of training steps runs where almost nothing is installed, and says what it leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ("--model", "tiny", "--batch", "4", "--steps", "1", "--warmup", "1", "--compile", "off")
# Hides packages as if they were not installed, then runs the script.
BARE = """
import runpy, sys
HIDDEN = {"deepspeed", "zarr", "omegaconf", "wandb", "nvidia", "lpips", "numcodecs", "tensorstore", "psutil",
          "google_crc32c", "transformers"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path.insert(0, "benchmarks")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bare_machine_measures_ddp_on_synthetic_latents_and_says_so(tmp_path):
    arguments = ("benchmarks/train_step.py", *TINY, "--store", "none", "--out", str(tmp_path / "result.json"))
    said = run(sys.executable, "-c", BARE, *arguments)
    for line in ("no deepspeed here", "no zarr here", "no transformers here"):
        assert line in said
    result = json.loads((tmp_path / "result.json").read_text())
    names = [entry["name"] for entry in result["rows"]]
    assert result["baseline"] == names[0] == "reference's way, TF32"
    assert {"ddp, triton kernels", "ddp, torch kernels", "ddp, torch kernels: EMA"} <= set(names)
    assert not any("deepspeed" in name for name in names)


def test_split_of_the_step_adds_up_with_latents_of_a_store(pristine_store, tmp_path):
    arguments = ("--store", str(pristine_store), "--kernels", "torch", "--no-encoder", "--accumulation", "2")
    run(sys.executable, "benchmarks/train_step.py", *TINY, *arguments, "--out", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["latent_shape"] == [32, 4, 4]
    rows = {entry["name"]: entry for entry in result["rows"]}
    name = "deepspeed, torch kernels, latents from the store"
    parts = [rows[f"{name}: {phase}"]["median"] for phase in ("data wait", "forward", "backward", "whole update")]
    inner = [rows[f"{name}: {phase}"]["median"] for phase in ("norm and guard", "optimizer", "EMA")]
    # One step was timed, and its phases follow one another.
    assert sum(parts) <= 8 * 1e3 / rows[name]["median"] * 1.001
    assert sum(inner) <= rows[f"{name}: whole update"]["median"]
