"""Device, precision, ranks and memory behind one small face."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

from rae_fast.errors import UserError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SUPERVISOR = "RAE_FAST_SUPERVISOR"  # environment variable: process id that this one must not outlive
WATCH_INTERVAL_S = 0.5

NICENESS = 10  # of threads that give way: a tenth of what another gets of a core that both want

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Ranks:
    """Which of the cooperating processes this one is."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process does what only one of them may do."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Ranks as torchrun and the deepspeed launcher set them; one process without a launcher.

    Raises:
        UserError: RANK, LOCAL_RANK or WORLD_SIZE is not a number, or they contradict one another.
    """
    try:
        rank = int(os.environ.get("RANK", 0))
        ranks = Ranks(rank, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        raise UserError(f"RANK, LOCAL_RANK or WORLD_SIZE in the environment: {error}", "whole numbers") from error
    if not 0 <= ranks.rank < ranks.world:
        raise UserError(
            f"RANK={ranks.rank} with WORLD_SIZE={ranks.world} in the environment",
            "RANK below WORLD_SIZE",
            "start through torchrun or deepspeed, or unset both",
        )
    return ranks


def compute_serially() -> None:
    """Have torch share nothing of what the calling thread computes with helper threads; for threads in the background.

    Each thread that shares its work keeps helpers of its own. Once a process has more of them than cores, OpenMP lets
    all of them sleep after each operation, those of the training thread too, and a step on a CPU takes twice as long.
    """
    torch.get_num_threads()  # the thread's first such call would undo the limit
    _thread_pools().limit(limits=1, user_api="openmp")


def give_way() -> None:
    """Have the calling thread and those that it starts leave the cores to others where both want them (on Linux).

    For what prepares batches beside a training thread. With equal claims it slows training down until its queue is
    full, then idles until training has taken a batch, and not all cores are at work.
    """
    if sys.platform != "linux":
        return
    with suppress(PermissionError):  # some sandboxes forbid the call; nothing but speed depends on it
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries, some milliseconds


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensors, where it can (glibc); for what computes on a CPU.

    By default it hands large blocks back to the system, which zeroes them page by page when they are used again: a
    tenth of a training step on a CPU, and a third of an encoder's.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        # Old versions refuse a threshold above 32 MB.
        if not library.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            library.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def on_all_devices(device: str, run: Callable[[Ranks], object]) -> None:
    """Call `run` with this process's ranks; where `device` is xla and the machine a TPU, in one process for each chip.

    Args:
        device: as `runtime.device`.
        run: picklable.
    """
    ranks = ranks_from_environment()
    if device != "xla":
        run(ranks)
        return
    from rae_fast.xla.device import launch

    launch(run, ranks)


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `xla`; for a CPU the process also keeps the memory that it frees.

    Raises:
        UserError: cuda or xla is asked for and absent, or the name is unknown.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "runtime.device is cuda, but torch sees no CUDA device",
                "a working GPU and driver",
                "set runtime.device=cpu or run tools/doctor.py",
            )
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if name == "xla":
        from rae_fast.xla.device import xla_device

        return xla_device()
    raise UserError(f"runtime.device is {name!r}", "auto, cpu, cuda or xla")


def init_distributed(ranks: Ranks, device: torch.device, timeout_minutes: float = 30.0) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs); nothing to do for a single process."""
    if ranks.world == 1 or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=timedelta(minutes=timeout_minutes),
    )


def barrier() -> None:
    """Wait for all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def set_precision(precision: str) -> torch.dtype:
    """Set the matmul mode for `fp32`, `tf32`, `bf16` or `fp16` and return the compute dtype.

    `fp32` means float32 throughout: TF32 only when it is asked for by name.

    Raises:
        UserError: the name is unknown.
    """
    if precision not in DTYPES:
        raise UserError(f"precision is {precision!r}", f"one of {', '.join(DTYPES)}")
    allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    return DTYPES[precision]


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """The name people know the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def follow_supervisor() -> None:
    """End this process when the one named in the environment is gone.

    A launcher that is killed outright leaves its ranks behind, and they would go on writing beside the next run's.
    """
    if SUPERVISOR in os.environ:
        pid = int(os.environ[SUPERVISOR])
        threading.Thread(target=_exit_without, args=(pid,), daemon=True).start()


def _exit_without(pid: int) -> None:
    import psutil  # here, so that benchmarks run on GPU machines without it

    try:
        supervisor = psutil.Process(pid)
        # is_running compares start times, so that a recycled process id does not pass for the supervisor.
        while supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_INTERVAL_S)
    except psutil.NoSuchProcess:
        pass  # it went before or between the looks at it
    os._exit(1)
