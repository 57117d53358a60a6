"""The demo is killed outright in each of its stages and started again: it ends as if nothing had happened."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("data", "encoder", "cache", "decoder", "dit", "samples", "evaluation")
SHORT = ("training.max_steps=12", "training.checkpoint_every=4", "sampler.params.num_steps=2")
DELAY_S = {"data": 3, "cache": 4, "decoder": 20, "dit": 15}
TIMEOUT_S = 1200


def _start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "tools/demo.py", "--folder", str(folder), *SHORT]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _kill_in(stage: str, folder: Path) -> None:
    process = _start(folder)
    begun, deadline_s = folder / "stages" / f"{stage}.begun", time.monotonic() + TIMEOUT_S
    while not begun.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    time.sleep(DELAY_S.get(stage, 1))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def _finish(folder: Path) -> dict:
    process = _start(folder)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return json.loads((folder / "metrics.json").read_text())


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_killed_in_every_stage_the_demo_ends_with_the_same_store_and_samples(tmp_path) -> None:
    folder = tmp_path / "demo"
    undisturbed = _finish(folder)
    store, samples = _digests(folder / "store"), (folder / "samples.npz").read_bytes()
    shutil.rmtree(folder)
    for stage in STAGES:
        _kill_in(stage, folder)
    resumed = _finish(folder)
    assert _digests(folder / "store") == store
    assert (folder / "samples.npz").read_bytes() == samples
    for name in ("psnr_db", "ssim", "frechet", "class_agreement_real", "failures", "images"):
        assert resumed[name] == undisturbed[name]
