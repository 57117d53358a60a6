"""Learning rates, EMA and AdamW against the reference's numbers (golden README, section 6)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from rae_fast.config_file import load_config
from rae_fast.training.ema import EMA
from rae_fast.training.schedule import build_schedule

GATE = 2e-6


def test_learning_rates_are_the_reference_s(golden_file: Callable[[str], Path], tmp_path: Path) -> None:
    tables = json.loads(golden_file("optim/lr_tables.json").read_text())
    for name, table in tables.items():
        # Through the YAML, so that legacy spellings are covered too.
        config_file = tmp_path / f"{name}.yaml"
        config_file.write_text(yaml.safe_dump({"training": table["training"]}))
        training = load_config(config_file).training
        defaults = table["optimizer_defaults"]
        assert training.optimizer.lr == pytest.approx(defaults["lr"], rel=GATE), name
        assert training.optimizer.betas == defaults["betas"], name
        assert training.optimizer.weight_decay == defaults["weight_decay"], name
        assert training.optimizer.eps == defaults["eps"], name
        schedule = build_schedule(
            training.scheduler, lr=training.optimizer.lr, steps_per_epoch=table["steps_per_epoch"]
        )
        ours = [schedule(step) for step in range(len(table["lr_used_at_step"]))]
        assert ours == pytest.approx(table["lr_used_at_step"], rel=GATE), name


def test_ema_is_the_reference_s(golden_file: Callable[[str], Path]) -> None:
    arrays = np.load(golden_file("optim/ema_adamw.npz"))

    def tensors(prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(prefix)}

    model, start = tensors("model/"), tensors("ema_before/")
    buffers = [name for name in model if re.search(r"running_|num_batches", name)]
    for decay in {n.split("/")[0].removeprefix("ema_after_") for n in arrays.files if n.startswith("ema_after_")}:
        module = nn.Module()
        flat = {name: name.replace(".", "_") for name in model if name not in buffers}
        for name, short in flat.items():
            module.register_parameter(short, nn.Parameter(start[name].clone()))
        ema = EMA(module, [float(decay)])
        with torch.no_grad():
            for name, short in flat.items():
                getattr(module, short).copy_(model[name])
        ema.update(module)
        for name, theirs in tensors(f"ema_after_{decay}/").items():
            ours = start[name] if name in buffers else ema.weights()[flat[name]]
            error = (ours.double() - theirs.double()).norm()
            assert error <= GATE * theirs.double().norm(), (decay, name)


def test_clipped_adamw_is_the_reference_s(golden_file: Callable[[str], Path]) -> None:
    arrays = np.load(golden_file("optim/ema_adamw.npz"))
    settings = json.loads(str(arrays["meta"]))["adamw"]
    parameter = nn.Parameter(torch.from_numpy(arrays["adamw/p0"]))
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    for gradient, norm, after in zip(
        arrays["adamw/grads"], arrays["adamw/total_norm_before_clip"], arrays["adamw/traj"], strict=True
    ):
        parameter.grad = torch.from_numpy(gradient.copy())
        found = nn.utils.clip_grad_norm_([parameter], settings["clip"])
        optimizer.step()
        assert float(found) == pytest.approx(float(norm), rel=GATE)
        assert np.linalg.norm(parameter.detach().numpy() - after) <= GATE * np.linalg.norm(after)
