"""The TorchXLA runtime behind a small face: devices, ranks, cutting graphs, counting compilations.

TPU is what this is for. `PJRT_DEVICE=CPU` runs the same graphs on any machine, and is what the tests use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks

HOST_PORT = "29531"  # where the processes of one TPU machine meet, when nobody says


def require_xla() -> Any:
    """The torch_xla module.

    Raises:
        UserError: it is not installed, or not the one that belongs to the torch that is.
    """
    os.environ.setdefault("PJRT_DEVICE", "TPU" if Path("/dev/accel0").exists() or "TPU_NAME" in os.environ else "CPU")
    try:
        import torch_xla
    except ImportError as error:
        raise UserError(
            f"runtime.device is xla, but torch_xla cannot be imported ({error}; torch is {torch.__version__})",
            "torch and torch_xla of one version",
            "pip install 'rae_fast[xla]' in an environment of its own",
        ) from error
    return torch_xla


def xla_device() -> torch.device:
    """This process's XLA device."""
    return require_xla().device()


def sync() -> None:
    """Compile (the first time) and start everything recorded so far; does not wait for it."""
    require_xla().sync()


def cut_before(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with everything recorded before each call made a graph of its own."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        sync()
        return function(*args, **kwargs)

    return call


def compilations() -> int:
    """How many graphs this process has compiled so far."""
    require_xla()
    import torch_xla.debug.metrics as metrics

    found = metrics.metric_data("CompileTime")
    return int(found[0]) if found else 0


def fallbacks() -> list[str]:
    """Operations that XLA could not take and that ran on the host, each time with a wait for the device."""
    require_xla()
    import torch_xla.debug.metrics as metrics

    return sorted(name for name in metrics.counter_names() if name.startswith("aten::"))


def launch(run: Callable[[Ranks], Any], ranks: Ranks) -> None:
    """Run on all XLA devices of this machine: one process for each on a TPU, this process on a CPU.

    Under torchrun, or another launcher that has set the ranks, this process is one of them already.

    Args:
        run: called in every process with its ranks.
        ranks: as the environment has them.
    """
    require_xla()
    import torch_xla.runtime as xr

    if ranks.world > 1 or xr.device_type() != "TPU":
        run(ranks)
        return
    require_xla().launch(_run_on_tpu, args=(run,))


def _run_on_tpu(_index: int, run: Callable[[Ranks], Any]) -> None:
    """One process of `launch`: the runtime knows who it is; the host's process group learns it from here."""
    import torch_xla.runtime as xr

    ranks = Ranks(xr.global_ordinal(), xr.local_ordinal(), xr.world_size())
    os.environ.update(RANK=str(ranks.rank), LOCAL_RANK=str(ranks.local_rank), WORLD_SIZE=str(ranks.world))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", HOST_PORT)
    run(ranks)
