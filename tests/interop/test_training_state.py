"""A checkpoint of our training, written as the reference's, goes on there exactly where ours would."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from rae_fast.config import Optimizer, Runtime, Scheduler
from rae_fast.dit.registry import build_dit
from rae_fast.errors import UserError
from rae_fast.interop.official import read_dit_weights
from rae_fast.interop.training_state import convert_run_checkpoint
from rae_fast.runtime import Ranks
from rae_fast.training.checkpoint import Checkpointer
from rae_fast.training.engine import Engine
from rae_fast.training.schedule import build_schedule

SIZES = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": [16, 24],
    "depth": [2, 1],
    "num_heads": [2, 2],
    "num_classes": 5,
}
OPTIMIZER = Optimizer(lr=1e-2, weight_decay=0.1)
STEPS, STEPS_PER_EPOCH = 3, 2
SCHEDULER = Scheduler("linear", warmup_epochs=1, decay_end_epoch=5, final_lr=1e-3)
SCHEDULE = build_schedule(SCHEDULER, lr=OPTIMIZER.lr, steps_per_epoch=STEPS_PER_EPOCH)


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build_dit("DiTDH", SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def batch(step: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    x, t = torch.randn(4, 8, 4, 4, generator=generator), torch.rand(4, generator=generator)
    return x, t, torch.arange(4), torch.ones(4)


def loss(model: Any, step: int) -> Tensor:
    x, t, y, u = batch(step)
    return model(x, t, y, labeldrop_u=u).float().square().mean()


def train(engine: Engine, step: int) -> None:
    engine.backward(loss(engine, step))
    engine.step()


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Engine]:
    """A run folder with one checkpoint after three steps, and the engine that made it."""
    folder = tmp_path / "run"
    engine = Engine(
        build(0).train(),
        optimizer=OPTIMIZER,
        lr=SCHEDULE,
        ranks=Ranks(),
        device=torch.device("cpu"),
        runtime=Runtime(engine="ddp", precision="fp32"),
        ema_decays=[0.9, 0.5],
    )
    log = []
    for step in range(STEPS):
        train(engine, step)
        log.append(json.dumps({"step": step + 1, "epoch": (step + 1) / STEPS_PER_EPOCH}))
    state = {"epoch": 2, "position": 0}
    Checkpointer(folder / "checkpoints", Ranks(), background=False).save(engine.steps, {"model": engine}, state)
    (folder / "log.jsonl").write_text("\n".join(log) + "\n")
    optimizer = {"lr": OPTIMIZER.lr, "weight_decay": OPTIMIZER.weight_decay}
    config = {
        "stage_1": {"params": {"encoder_cls": "TimmViT", "encoder_input_size": 64}},
        "stage_2": {"target": "DiTDH", "params": {k: v for k, v in SIZES.items() if k != "num_classes"}},
        "misc": {"latent_size": [8, 4, 4]},
        "training": {"optimizer": optimizer, "scheduler": asdict(SCHEDULER)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder, engine


def test_the_reference_s_trainer_goes_on_where_ours_stopped(run: tuple[Path, Engine], tmp_path: Path) -> None:
    folder, engine = run
    assert convert_run_checkpoint(folder / "checkpoints", tmp_path / "ep.pt") == STEPS
    content = torch.load(tmp_path / "ep.pt", weights_only=True)
    assert list(content) == ["step", "epoch", "model", "ema", "optimizer", "scheduler"]
    assert (content["step"], content["epoch"]) == (STEPS, 2)

    model = build(1).train()
    model.load_state_dict(content["model"], strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULE(step) / OPTIMIZER.lr)
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(SCHEDULE(STEPS))
    scheduler.load_state_dict(content["scheduler"])
    assert scheduler.last_epoch == STEPS

    for step in range(STEPS, STEPS + 2):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        scheduler.step()
        train(engine, step)
    ours = engine.weights()
    for name, theirs in model.state_dict().items():
        torch.testing.assert_close(
            theirs, ours[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_first_average_is_the_ema(run: tuple[Path, Engine], tmp_path: Path) -> None:
    folder, engine = run
    convert_run_checkpoint(folder / "checkpoints" / f"step-{STEPS:07d}", tmp_path / "ep.pt")
    ema = read_dit_weights(tmp_path / "ep.pt")
    ours = engine.ema_weights(0.9)
    assert set(ema) == set(ours)
    assert all(torch.equal(ema[name], ours[name]) for name in ours)
    online = read_dit_weights(tmp_path / "ep.pt", "model")
    assert all(torch.equal(online[name], value) for name, value in engine.weights().items())


def test_a_schedule_in_epochs_needs_the_run_s_log(run: tuple[Path, Engine], tmp_path: Path) -> None:
    folder, _ = run
    (folder / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"log\.jsonl"):
        convert_run_checkpoint(folder / "checkpoints", tmp_path / "ep.pt")


def test_damaged_or_foreign_checkpoints_are_refused(run: tuple[Path, Engine], tmp_path: Path) -> None:
    folder, _ = run
    checkpoint = folder / "checkpoints" / f"step-{STEPS:07d}"
    with pytest.raises(UserError, match="no checkpoint in"):
        convert_run_checkpoint(tmp_path, tmp_path / "ep.pt")
    data = next(checkpoint.glob("rank-*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        convert_run_checkpoint(checkpoint, tmp_path / "ep.pt")
    assert not (tmp_path / "ep.pt").exists()
