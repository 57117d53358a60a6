"""Start a training tool under the deepspeed launcher, in such a way that nothing outlives its starter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.runtime import SUPERVISOR, pick_device
from rae_fast.shipped import shipped

CPU_RANKS = 2


def launch_training(tool: str, config_file: Path, overrides: Sequence[str], config: Config) -> None:
    """Run `deepspeed tool --config config_file overrides...` to its end: a rank for each GPU, or two on a CPU.

    Raises:
        UserError: the training ended with an error; it has printed its own line.
    """
    on_cpu = pick_device(config.runtime.device).type == "cpu"
    ranks = min(CPU_RANKS, len(os.sched_getaffinity(0))) if on_cpu else torch.cuda.device_count()
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    command += ["--master_port", str(_free_port()), "--log_level", "warning"]
    command += [str(shipped(tool)), "--config", str(config_file), *overrides]
    environment = {**os.environ, SUPERVISOR: str(os.getpid())}
    # The launcher finds `python` and ninja on the path of the environment that it was installed into.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if on_cpu:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(threads))
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise UserError(
            f"{tool} ended with status {done.returncode}",
            "status 0",
            "its own message stands above; the same command resumes",
        )


def _free_port() -> int:
    """A port that nothing listens on right now, so that two trainings on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
