"""Checkpoints of our runs as the reference's `ep-*.pt`, from which its trainer goes on.

Shapes: parameters have the shapes of the module; our checkpoints hold them flat, in pieces.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.config import Config, Optimizer
from rae_fast.config_file import load_config
from rae_fast.dit.registry import build_dit
from rae_fast.errors import UserError
from rae_fast.geometry import dit_params, resolve_geometry
from rae_fast.interop.official import save_content
from rae_fast.provenance import read_json
from rae_fast.runtime import Ranks
from rae_fast.training.batching import count_steps
from rae_fast.training.restore import FORMAT, find_damage, newest, read_fixed, read_whole
from rae_fast.training.schedule import build_schedule

ENGINE = "model"
LABEL_TABLE = "y_embedder.embedding_table.weight"


def convert_run_checkpoint(source: str | Path, target: str | Path) -> int:
    """Write {step, epoch, model, ema, optimizer, scheduler} of a DiT run's checkpoint; returns the optimizer step.

    The reference trains position table and Fourier frequencies too; where we kept them fixed, their moments are zero.

    Args:
        source: checkpoints/step-* in a run folder, or the checkpoints folder, whose newest is taken.
        target: the .pt to write.

    Raises:
        UserError: the checkpoint is damaged, of another kind of training, or holds no EMA.
    """
    source = newest(Path(source))
    manifest = _read_manifest(source)
    about = manifest["engines"][ENGINE]
    if about.get("optimizer", "adamw") != "adamw":
        raise UserError(
            f"checkpoint {source} was made by optimizer.type {about['optimizer']}",
            "adamw, the one optimizer of the reference",
            "use the weights in the run's export folder",
        )
    averages = [kind for kind in about["kinds"] if kind.startswith("ema/")]
    if not averages:
        raise UserError(f"checkpoint {source} holds no EMA", "a run with training.ema_decay", "use its export folder")
    config = load_config(source.parent.parent / "config.yaml")
    fixed = read_fixed(source, ENGINE)
    kinds = ("master", "exp_avg", "exp_avg_sq", averages[0])
    trained = {kind: read_whole(source, manifest, ENGINE, kind) for kind in kinds}
    module = _module(config, (trained["master"] | fixed)[LABEL_TABLE])
    step, state = manifest["step"], read_json(source / "state.json")
    lr = _next_lr(source.parent.parent, config, step)
    names = [name for name, _ in module.named_parameters()]
    moments = {name: (trained["exp_avg"].get(name), trained["exp_avg_sq"].get(name)) for name in names}
    content = {
        "step": step,
        "epoch": int(state["trainer"].get("epoch", 0)),
        "model": _state_dict(module, trained["master"] | fixed),
        "ema": _state_dict(module, trained[averages[0]] | fixed),
        "optimizer": {
            "state": _optimizer_state(state["engines"][ENGINE]["optimizer_steps"], moments, module),
            "param_groups": [_group(config.training.optimizer, lr, len(names))],
        },
        "scheduler": _scheduler(config.training.optimizer, lr, step),
    }
    save_content(target, content)
    return step


def _read_manifest(source: Path) -> dict[str, Any]:
    damage = find_damage(source, Ranks(0, 0, 1))
    if damage is not None:
        raise UserError(f"checkpoint {source} is damaged ({damage})", "a whole checkpoint", "take the one before")
    manifest = read_json(source / "manifest.json")
    if manifest.get("format") != FORMAT or ENGINE not in manifest["engines"]:
        raise UserError(f"{source} is no checkpoint of a diffusion transformer", f"one of format {FORMAT}")
    return manifest


def _module(config: Config, label_table: Tensor) -> nn.Module:
    """The run's model without memory: its order of parameters is that of the reference's optimizer."""
    params = dit_params(config, resolve_geometry(config))
    with torch.device("meta"):
        # The number of classes may have come from the store.
        has_null_row = params.get("class_dropout_prob", 0.1) > 0
        return build_dit(config.stage_2.target, {**params, "num_classes": len(label_table) - has_null_row})


def _state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((name, tensors[name]) for name in module.state_dict())


def _optimizer_state(
    steps: float, moments: Mapping[str, tuple[Tensor | None, Tensor | None]], module: nn.Module
) -> dict[int, dict[str, Tensor]]:
    """torch's AdamW state, by the parameters' numbers."""
    state = {}
    for i, (name, parameter) in enumerate(module.named_parameters()):
        first, second = (torch.zeros(parameter.shape) if moment is None else moment for moment in moments[name])
        state[i] = {"step": torch.tensor(float(steps)), "exp_avg": first, "exp_avg_sq": second}
    return state


def _next_lr(run: Path, config: Config, step: int) -> float:
    """The learning rate of the step after `step`: the reference's checkpoints hold that of the next one."""
    training = config.training
    by_epoch = (training.scheduler.warmup_epochs, training.scheduler.decay_end_epoch)
    steps_per_epoch = _steps_per_epoch(run)
    if steps_per_epoch is None and (any(by_epoch) or training.scheduler.type == "wsd"):
        raise UserError(
            f"{run / 'log.jsonl'} does not say how many steps an epoch has",
            "the log of the run, as its schedule counts epochs",
            "keep log.jsonl beside the checkpoints folder",
        )
    steps_per_epoch = steps_per_epoch or 1
    total_steps = count_steps(training, steps_per_epoch)
    schedule = build_schedule(
        training.scheduler, lr=training.optimizer.lr, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    return schedule(step)


def _steps_per_epoch(run: Path) -> int | None:
    """Optimizer steps of an epoch, from a line of the log; None without one."""
    log = run / "log.jsonl"
    for line in log.read_text().splitlines() if log.is_file() else []:
        entry = json.loads(line)
        if entry.get("epoch"):
            return round(entry["step"] / entry["epoch"])
    return None


def _group(optimizer: Optimizer, lr: float, count: int) -> dict[str, Any]:
    """The parameter group as torch's AdamW writes it."""
    parameter = torch.zeros(1, requires_grad=True)
    defaults = torch.optim.AdamW(
        [parameter],
        lr=lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    return {**defaults.state_dict()["param_groups"][0], "initial_lr": optimizer.lr, "params": list(range(count))}


def _scheduler(optimizer: Optimizer, lr: float, step: int) -> dict[str, Any]:
    """State of the LambdaLR that the reference steps once per optimizer step."""
    return {
        "base_lrs": [optimizer.lr],
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [lr],
        "lr_lambdas": [None],
    }
