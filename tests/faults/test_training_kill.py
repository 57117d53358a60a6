from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log

REPOSITORY = Path(__file__).parents[2]
STEPS = 60
KILLS, SOAK_STEPS = 20, 260
START_TIMEOUT_S = 900.0  # of a machine with much else to do


def load_tiny_run() -> ModuleType:
    path = REPOSITORY / "tests/training/tiny_run.py"
    specification = importlib.util.spec_from_file_location("tiny_run", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


tiny_run = load_tiny_run()
OVERRIDES = (f"training.max_steps={STEPS}", "training.checkpoint_every=5", "training.global_batch_size=16")


class Run(ABC):
    """A training whose log is watched.

    Args:
        folder: holds config and run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.log, self.output = folder / "run/log.jsonl", folder / "output.txt"

    @property
    def step(self) -> int:
        """The last step logged."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        return int(whole[-1].split('"step": ')[1].split(",")[0]) if whole else 0

    def wait_for_step(self, step: int) -> bool:
        """Until that step is logged, or the run has ended; returns whether it still runs."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self.alive() and self.step < step:
            assert time.monotonic() < deadline_s, self.text()
            time.sleep(0.005)
        return self.alive()

    @abstractmethod
    def alive(self) -> bool:
        """Whether it still runs."""

    def text(self) -> str:
        """What it printed."""
        return self.output.read_text()


class LaunchedRun(Run):
    """One process tree of the training tool.

    Args:
        folder: holds config and run folder.
        data: encoder and latent store.
        launcher: "python", "deepspeed" for two ranks, or a command that starts ranks with its arguments.
        overrides: key=value.
    """

    def __init__(self, folder: Path, data: tuple[Path, Path], launcher: str | Sequence[str], *overrides: str) -> None:
        super().__init__(folder)
        tool = [str(REPOSITORY / "tools/train_dit.py"), *tiny_run.write_config(folder, *data), *OVERRIDES, *overrides]
        if launcher == "python":
            launcher = (sys.executable,)
        elif launcher == "deepspeed":
            launcher = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()))
        executable = Path(sys.executable).with_name(Path(launcher[0]).name)
        command = [str(executable), *launcher[1:], *tool]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the launcher and all ranks at once."""
        tree = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in tree:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(timeout=START_TIMEOUT_S)


class Forker:
    """A process that forks ranks of the training tool, see rank_forker.py."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("rank_forker.py"))]
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **order: object) -> list[int]:
        """One order and its answer."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class ForkedRun(Run):
    """Ranks forked from a process that has everything imported.

    Args:
        forker: starts them.
        folder: holds config and run folder.
        data: encoder and latent store.
        world: number of ranks.
        overrides: key=value.
    """

    def __init__(self, forker: Forker, folder: Path, data: tuple[Path, Path], world: int, *overrides: str) -> None:
        super().__init__(folder)
        self.forker = forker
        arguments = [*tiny_run.write_config(folder, *data), *OVERRIDES, *overrides]
        self.ranks = forker.ask(arguments=arguments, world=world, port=free_port(), output=str(self.output))

    def alive(self) -> bool:
        return all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in self.ranks)

    def kill(self) -> None:
        """SIGKILL for all ranks at once."""
        for pid in self.ranks:
            os.kill(pid, signal.SIGKILL)
        assert self.finish() == -signal.SIGKILL

    def finish(self) -> int:
        """Wait for the end; the exit status."""
        statuses = set(self.forker.ask(wait=self.ranks))
        return statuses.pop() if len(statuses) == 1 else 1


def environment() -> dict[str, str]:
    """Of a run on CPUs whose launcher finds this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}


def free_port() -> int:
    """A port for a run's ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def data(tiny_encoder: Path, pristine_store: Path) -> tuple[Path, Path]:
    """Encoder and store."""
    torch.set_num_threads(1)
    return tiny_encoder, pristine_store


@pytest.fixture
def launch(data: tuple[Path, Path]) -> Iterator[Callable[..., LaunchedRun]]:
    """`launch(folder, launcher, "key=value", ...)` starts a run; what is left of it at the end is killed."""
    started = []

    def make(folder: Path, launcher: str | Sequence[str], *overrides: str) -> LaunchedRun:
        started.append(LaunchedRun(folder, data, launcher, *overrides))
        return started[-1]

    yield make
    for run in started:
        if run.alive():
            run.kill()


def undisturbed_here(folder: Path, data: tuple[Path, Path], *overrides: str) -> Path:
    """The log of the same run on one rank in this process."""
    folder.mkdir()
    train_dit(tiny_run.make_config(folder, *data, *OVERRIDES, *overrides))
    return folder / "run/log.jsonl"


def test_killed_at_random_steps_leaves_the_loss_file_of_the_undisturbed_run(data, launch, tmp_path):
    (tmp_path / "b").mkdir()
    expected = undisturbed_here(tmp_path / "a", data, "runtime.engine=ddp")
    chance = random.Random(5)
    for kill in range(2):
        run = launch(tmp_path / "b", "python", "runtime.engine=ddp")
        if run.wait_for_step(chance.randrange(10 + 20 * kill, 25 + 20 * kill)):
            run.kill()
    run = launch(tmp_path / "b", "python", "runtime.engine=ddp")
    assert run.finish() == 0, run.text()
    assert run.log.read_bytes() == expected.read_bytes()


@pytest.mark.timeout(1800)  # three starts
def test_two_ranks_of_the_deepspeed_launcher_survive_a_kill_and_a_signal(data, launch, tmp_path):
    (tmp_path / "b").mkdir()
    evaluate = ("eval.eval_interval=5", "eval.num_images=12", "sampler.params.num_steps=2")
    expected = read_log(undisturbed_here(tmp_path / "a", data, *evaluate))
    run = launch(tmp_path / "b", "deepspeed", *evaluate)
    assert run.wait_for_step(8), run.text()
    run.kill()
    run = launch(tmp_path / "b", "deepspeed", *evaluate)
    assert run.wait_for_step(20), run.text()
    # A scheduler's warning reaches one rank only; all must stop at the same step, with a checkpoint.
    ranks = [child for child in psutil.Process(run.process.pid).children(recursive=True) if is_rank(child)]
    ranks[-1].send_signal(signal.SIGUSR1)
    assert run.finish() == 0, run.text()
    assert run.step < STEPS, "it must have stopped early"
    assert "with a checkpoint; the same command goes on from here" in run.text()
    # One rank finishes what two began.
    run = launch(tmp_path / "b", "python", *evaluate)
    assert run.finish() == 0, run.text()
    found = read_log(run.log)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
    distances = [[e["fd_latent"] for e in read_log(tmp_path / run / "run/eval.jsonl")] for run in ("a", "b")]
    assert len(distances[0]) == STEPS // 5
    # The first of them were made by two ranks, the last ones by one.
    assert distances[1] == pytest.approx(distances[0], rel=1e-4)


def test_two_launchers_with_a_host_file_are_one_run(data, launch, tmp_path):
    """As on two machines that see one file system, without ssh between them."""
    (tmp_path / "b").mkdir()
    short = ("training.max_steps=4", "training.checkpoint_every=2")
    expected = read_log(undisturbed_here(tmp_path / "a", data, *short))
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    port = free_port()
    launchers = []
    for node in range(2):
        where = ["--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        start = ("deepspeed", "--hostfile", str(tmp_path / "hosts"), *where)
        launchers.append(launch(tmp_path / "b", start, *short))
    assert [run.finish() for run in launchers] == [0, 0], launchers[0].text()
    manifest = json.loads((tmp_path / "b/run/manifest.json").read_text())
    assert manifest["ranks"] == 2
    found = read_log(launchers[0].log)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5)


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is one of the ranks, not the launcher."""
    command = process.cmdline()
    return any(part.endswith("train_dit.py") for part in command) and not any("launch" in part for part in command)


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    """Forks the ranks of the soaks."""
    made = Forker()
    yield made
    made.close()


def soak(forker: Forker, folder: Path, data: tuple[Path, Path], worlds: tuple[int, ...]) -> list[int]:
    """Train `SOAK_STEPS` steps through one kill for each of `worlds`, on that many ranks each; where it was killed."""
    folder.mkdir()
    chance, killed, length = random.Random(0), [], f"training.max_steps={SOAK_STEPS}"
    for world in worlds:
        run = ForkedRun(forker, folder, data, world, length)
        # Past the newest checkpoint, at any moment of a step or of a checkpoint's writing.
        reached = killed[-1] if killed else 0
        assert run.wait_for_step(reached + chance.randrange(6, 11)), run.text()
        time.sleep(chance.random() * 0.05)
        run.kill()
        killed.append(run.step)
    run = ForkedRun(forker, folder, data, worlds[-1], length)
    assert run.finish() == 0, run.text()
    print(f"killed after steps {killed}")
    return killed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_killed_at_twenty_random_steps_have_the_bytes_of_the_undisturbed_run(data, forker, tmp_path):
    (tmp_path / "undisturbed").mkdir()
    run = ForkedRun(forker, tmp_path / "undisturbed", data, 2, f"training.max_steps={SOAK_STEPS}")
    assert run.finish() == 0, run.text()
    killed = soak(forker, tmp_path / "killed", data, (2,) * KILLS)
    assert len(killed) == KILLS
    assert killed[-1] < SOAK_STEPS
    assert (tmp_path / "killed/run/log.jsonl").read_bytes() == run.log.read_bytes()
    exports = [sorted((tmp_path / run / "run/export").glob("*.safetensors")) for run in ("killed", "undisturbed")]
    assert [path.read_bytes() for path in exports[0]] == [path.read_bytes() for path in exports[1]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_two_and_one_rank_killed_at_twenty_random_steps_have_the_losses_of_one(data, forker, tmp_path):
    expected = read_log(undisturbed_here(tmp_path / "one", data, f"training.max_steps={SOAK_STEPS}"))
    soak(forker, tmp_path / "killed", data, tuple((1, 2)[i % 2] for i in range(KILLS)))
    found = read_log(tmp_path / "killed/run/log.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
