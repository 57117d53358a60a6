import os
import platform
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from rae_fast.errors import UserError
from rae_fast.runtime import (
    SUPERVISOR,
    Ranks,
    compute_serially,
    pick_device,
    ranks_from_environment,
    set_precision,
)

FOLLOWER = (
    "from rae_fast.runtime import follow_supervisor; import time; follow_supervisor(); print('up'); time.sleep(60)"
)

# Page faults of tensors of 1 and of 100 MB, each made and freed often before: a block that was cut off for alignment
# does not hold the next tensor, so that the first few may still need new memory.
FAULTS = """
import resource, torch
from rae_fast.runtime import pick_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for numbers in (250_000, 25_000_000):
        torch.empty(numbers).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = [faults() for _ in range(12)][-1]
pick_device("cpu")
print(by_default, [faults() for _ in range(12)][-1])
"""


def test_ranks_come_from_the_launchers_environment(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_from_environment() == Ranks(0, 0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks_from_environment() == Ranks(3, 1, 4)
    assert not ranks_from_environment().is_main


@pytest.mark.parametrize(("rank", "world"), [("4", "4"), ("x", "2")])
def test_impossible_ranks_are_refused(monkeypatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match="RANK"):
        ranks_from_environment()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line() -> None:
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_a_process_that_computes_on_a_cpu_keeps_freed_memory() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    by_default, kept = map(int, done.stdout.split())
    # Pages may be of up to 2 MB.
    assert by_default >= 20 and kept <= by_default / 10


def test_fp32_means_fp32() -> None:
    assert set_precision("tf32") == torch.float32
    assert torch.backends.cuda.matmul.allow_tf32
    assert set_precision("fp32") == torch.float32
    assert not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(UserError, match="fp23"):
        set_precision("fp23")


def test_a_process_does_not_outlive_its_supervisor() -> None:
    supervisor = subprocess.Popen(["sleep", "60"])
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER],
        env={**os.environ, SUPERVISOR: str(supervisor.pid), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
    )
    try:
        assert follower.stdout.readline() == b"up\n"
        time.sleep(1)
        assert psutil.pid_exists(follower.pid)
        assert follower.poll() is None
        supervisor.kill()
        supervisor.wait()
        assert follower.wait(timeout=10) == 1
    finally:
        supervisor.kill()
        follower.kill()


@pytest.mark.usefixtures("three_threads")
def test_a_thread_that_computes_serially_leaves_the_others_their_threads() -> None:
    seen = []

    def run() -> None:
        seen.append(torch.get_num_threads())
        compute_serially()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [3, 1]
    assert torch.get_num_threads() == 3
