"""Compiles kernels into Triton's cache in several processes, so that timing many configurations need not wait.

    python -m rae_kernels.warm < jobs

Each job is one pickled list of the standard input; the processes never touch a GPU.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rae_kernels.launches import Maker, Stack

MOST_PROCESSES = 16
JOBS_PER_PROCESS = 4


class Job(NamedTuple):
    """One kernel in one configuration, as `launches.launch_of` makes it on tensors without memory."""

    operation: str
    stack: Stack
    make: Maker
    config: dict[str, Any]


def compile_ahead(jobs: Sequence[Job], capability: int, timeout_s: float = 600.0) -> int:
    """Compile jobs for a GPU's compute capability (times ten); gives how many processes took part.

    What fails to compile here fails again, and is reported, where it is started.
    """
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, -(-len(jobs) // JOBS_PER_PROCESS))
    # Without a device of its own a child cannot take memory of the one that is being measured.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    children = []
    for number in range(processes):
        child = subprocess.Popen([sys.executable, "-m", "rae_kernels.warm"], stdin=subprocess.PIPE, env=environment)
        with child.stdin:
            child.stdin.write(pickle.dumps((list(jobs[number::processes]), capability)))
        children.append(child)
    try:
        for child in children:
            child.wait(timeout_s)
    finally:
        for child in children:
            child.kill()
    return processes


def _compile_all(jobs: Sequence[Job], capability: int) -> None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from rae_kernels import launches, resources

    for job in jobs:
        made = launches.launch_of(job.operation, job.stack, job.make, job.config)
        try:
            resources.warm(made, capability)
        except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
            print(f"{job.operation} {job.config}: {error}", file=sys.stderr)


if __name__ == "__main__":
    _compile_all(*pickle.load(sys.stdin.buffer))
