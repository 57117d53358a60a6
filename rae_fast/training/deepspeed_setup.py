"""DeepSpeed as an engine part: its configuration from ours, a quiet start, no compiler needed.

Facts about DeepSpeed 0.18-0.19 that this file works around are stated where they matter.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rae_fast.errors import UserError, nearest
from rae_fast.provenance import read_json
from rae_fast.runtime import Ranks

# What the engine decides itself; a DeepSpeed config that also says it would be silently half obeyed.
OURS = {
    "optimizer": "training.optimizer",
    "scheduler": "training.scheduler",
    "gradient_clipping": "training.clip_grad",
    "gradient_accumulation_steps": "training.grad_accum_steps",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "fp16": "runtime.precision",
    "torch_autocast": "runtime.precision",
    "amp": "runtime.precision",
}
SECTIONS = (
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "sparse_gradients",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


def read_deepspeed_config(section: Any) -> dict[str, Any]:
    """The `deepspeed` section of a config as a mapping: inline, the path of its JSON file, or ZeRO stage 1.

    Raises:
        UserError: the file is missing or not JSON, a key belongs to another section or is unknown, or the stage is
            not 0 to 3, or offloads.
    """
    if section is None:
        return {"zero_optimization": {"stage": 1}}
    origin = "deepspeed"
    if isinstance(section, str | Path):
        origin, section = str(section), read_json(section)
    if not isinstance(section, Mapping):
        raise UserError(f"{origin} is {section!r}", "a mapping, or the path of a JSON file")
    config = copy.deepcopy(dict(section))
    for key, value in config.items():
        if key in OURS and value not in ("auto", None):
            raise UserError(f"{origin}: {key}", f"{OURS[key]} to say it", f"move it to {OURS[key]}")
        if key not in SECTIONS and key not in OURS:
            raise UserError(f"{origin}: unknown key {key}{nearest(key, SECTIONS)}", f"one of {', '.join(SECTIONS)}")
    _check_zero(config.get("zero_optimization", {}), origin)
    _check_bf16(config, origin)
    return {key: value for key, value in config.items() if key not in OURS}


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed config; DeepSpeed's own default is 0."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check_precision(config: Mapping[str, Any], precision: str) -> None:
    """Refuse bfloat16 parameters in a run of another precision.

    Raises:
        UserError: they contradict each other.
    """
    if (config.get("bf16") or {}).get("enabled") and precision != "bf16":
        raise UserError(
            f"deepspeed: bf16.enabled with runtime.precision={precision}",
            "runtime.precision=bf16",
            "leave bf16 out of the deepspeed section, or set runtime.precision=bf16",
        )


def initialize(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    *,
    accumulation: int,
    micro_batch: int,
    ranks: Ranks,
    device: torch.device,
) -> Any:
    """A `deepspeed.DeepSpeedEngine` around the module and optimizer, without its log lines and compiled extras."""
    deepspeed = import_deepspeed(ranks, device)
    join_single_process_group(ranks, device)
    full = dict(copy.deepcopy(dict(config)))
    full["train_micro_batch_size_per_gpu"] = micro_batch
    full["gradient_accumulation_steps"] = accumulation
    full["gradient_clipping"] = 0.0  # the engine clips; left out, DeepSpeed would clip at 1
    full.setdefault("steps_per_print", 2**31)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if zero_stage(full) in (1, 2) and "compute_grad_norm" in DeepSpeedZeroConfig.model_fields:
        # The engine takes norm, clipping and guard over: DeepSpeed's read the norm on the host in every step.
        full["zero_optimization"]["compute_grad_norm"] = False
    if zero_stage(full) == 3:
        # Otherwise DeepSpeed replaces torch.nn.functional.linear for the whole process.
        full["zero_optimization"]["memory_efficient_linear"] = False
    if full.get("bf16", {}).get("enabled"):
        full["bf16"] = {**full["bf16"], "check_grad_overflow": False}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=full)
    return engine


def import_deepspeed(ranks: Ranks, device: torch.device) -> Any:
    """Import DeepSpeed for this device with its logger at WARNING and without its just-in-time builds."""
    # Read at import: a CPU run on a machine with GPUs must say so before.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed insists on these; a process without a launcher has none.
    for name, value in (("RANK", ranks.rank), ("LOCAL_RANK", ranks.local_rank), ("WORLD_SIZE", ranks.world)):
        os.environ.setdefault(name, str(value))
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # torch renames collectives that DeepSpeed still calls by the old names, and says so at every call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Joining a process group otherwise builds a shared-memory op with g++ (minutes, and only used in inference) and
    # probes every extension with compiler subprocesses.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def join_single_process_group(ranks: Ranks, device: torch.device) -> None:
    """A process group of one, without a port: DeepSpeed always communicates."""
    if ranks.world > 1 or torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def _check_zero(zero: Mapping[str, Any], origin: str) -> None:
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{origin}: zero_optimization.stage is {stage!r}", "0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise UserError(
                f"{origin}: zero_optimization.{key}",
                "no offload",
                "save memory by runtime.activation_checkpointing or a smaller training.batch_size",
            )


def _check_bf16(config: Mapping[str, Any], origin: str) -> None:
    if not (config.get("bf16") or {}).get("enabled"):
        return
    if zero_stage(config) == 0:
        raise UserError(
            f"{origin}: bf16.enabled with ZeRO stage 0",
            "stage 1, 2 or 3, which keep float32 master weights in flat shards",
            "set zero_optimization.stage: 1, or leave bf16 out: runtime.precision=bf16 keeps float32 parameters",
        )
    if zero_stage(config) == 1 and (config.get("data_types") or {}).get("grad_accum_dtype") == "fp32":
        raise UserError(
            f"{origin}: data_types.grad_accum_dtype fp32 with bf16 parameters and ZeRO stage 1",
            "stage 2",
            "set zero_optimization.stage: 2, or leave bf16 out: runtime.precision=bf16 keeps float32 gradients",
        )
