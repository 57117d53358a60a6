from __future__ import annotations

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log

REPOSITORY = Path(__file__).parents[2]
STEPS = 60
START_TIMEOUT_S = 240.0


def load_tiny_run() -> ModuleType:
    path = REPOSITORY / "tests/training/tiny_run.py"
    specification = importlib.util.spec_from_file_location("tiny_run", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


tiny_run = load_tiny_run()
OVERRIDES = (f"training.max_steps={STEPS}", "training.checkpoint_every=5", "training.global_batch_size=16")


class Run:
    """One process tree of the training tool.

    Args:
        folder: holds config and run folder.
        data: encoder and latent store.
        launcher: "python", or "deepspeed" for two ranks.
        overrides: key=value.
    """

    def __init__(self, folder: Path, data: tuple[Path, Path], launcher: str, *overrides: str) -> None:
        self.log = folder / "run/log.jsonl"
        tool = [str(REPOSITORY / "tools/train_dit.py"), *tiny_run.write_config(folder, *data), *OVERRIDES, *overrides]
        command = [sys.executable, *tool]
        if launcher == "deepspeed":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
            command = [*start, *tool]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        self.output = (folder / "output.txt").open("a+")
        self.process = subprocess.Popen(command, env=environment, stdout=self.output, stderr=subprocess.STDOUT)

    @property
    def step(self) -> int:
        """The last step logged."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        return int(whole[-1].split('"step": ')[1].split(",")[0]) if whole else 0

    def wait_for_step(self, step: int) -> bool:
        """Until that step is logged, or the run has ended; returns whether it still runs."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and self.step < step:
            assert time.monotonic() < deadline_s, self.text()
            time.sleep(0.005)
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the launcher and all ranks at once."""
        tree = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in tree:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(timeout=400)

    def text(self) -> str:
        """What it printed."""
        self.output.seek(0)
        return self.output.read()


@pytest.fixture(scope="module")
def data(tiny_encoder: Path, pristine_store: Path) -> tuple[Path, Path]:
    """Encoder and store."""
    torch.set_num_threads(1)
    return tiny_encoder, pristine_store


def undisturbed_here(folder: Path, data: tuple[Path, Path], *overrides: str) -> Path:
    """The same run on one rank in this process."""
    train_dit(tiny_run.make_config(folder, *data, *OVERRIDES, *overrides))
    return folder / "run/log.jsonl"


def test_killed_at_random_steps_leaves_the_loss_file_of_the_undisturbed_run(data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = undisturbed_here(tmp_path / "a", data, "runtime.engine=ddp")
    chance = random.Random(5)
    for kill in range(2):
        run = Run(tmp_path / "b", data, "python", "runtime.engine=ddp")
        if run.wait_for_step(chance.randrange(10 + 20 * kill, 25 + 20 * kill)):
            run.kill()
    run = Run(tmp_path / "b", data, "python", "runtime.engine=ddp")
    assert run.finish() == 0, run.text()
    assert run.log.read_bytes() == expected.read_bytes()


@pytest.mark.timeout(900)  # three starts of the launcher
def test_two_ranks_of_the_deepspeed_launcher_survive_a_kill_and_a_signal(data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = read_log(undisturbed_here(tmp_path / "a", data))
    run = Run(tmp_path / "b", data, "deepspeed")
    assert run.wait_for_step(8), run.text()
    run.kill()
    run = Run(tmp_path / "b", data, "deepspeed")
    assert run.wait_for_step(20), run.text()
    # A scheduler's warning reaches one rank only; all must stop at the same step, with a checkpoint.
    ranks = [child for child in psutil.Process(run.process.pid).children(recursive=True) if is_rank(child)]
    ranks[-1].send_signal(signal.SIGUSR1)
    assert run.finish() == 0, run.text()
    assert run.step < STEPS, "it must have stopped early"
    assert "with a checkpoint; the same command goes on from here" in run.text()
    # One rank finishes what two began.
    run = Run(tmp_path / "b", data, "python")
    assert run.finish() == 0, run.text()
    found = read_log(run.log)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5)


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is one of the ranks, not the launcher."""
    command = process.cmdline()
    return any(part.endswith("train_dit.py") for part in command) and not any("launch" in part for part in command)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_killed_at_twenty_random_steps_have_the_bytes_of_the_undisturbed_run(data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run = Run(tmp_path / "a", data, "deepspeed", "training.max_steps=240")
    assert run.finish() == 0, run.text()
    chance = random.Random(0)
    kills = 0
    while kills < 20:
        run = Run(tmp_path / "b", data, "deepspeed", "training.max_steps=240")
        # Past the newest checkpoint, at any moment of a step or of a checkpoint's writing.
        assert run.wait_for_step(11 * (kills + 1) + chance.randrange(6)), run.text()
        time.sleep(chance.random() * 0.05)
        run.kill()
        kills += 1
    run = Run(tmp_path / "b", data, "deepspeed", "training.max_steps=240")
    assert run.finish() == 0, run.text()
    assert run.log.read_bytes() == (tmp_path / "a/run/log.jsonl").read_bytes()
