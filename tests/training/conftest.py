from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from rae_fast.config import Config, Optimizer, Runtime
from rae_fast.runtime import Ranks
from rae_fast.training.engine import Engine

MakeEngine = Callable[..., Engine]
DECODER_CONFIG = {
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 48,
    "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


class Regression(nn.Module):
    """A small module with what engines must tell apart: norms, biases, a frozen parameter, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7), requires_grad=False)
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, 7))
        self.first = nn.Linear(7, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(torch.nn.functional.silu(self.first(x * self.scale + self.offset))))


def regression(seed: int = 0) -> Regression:
    torch.manual_seed(seed)
    return Regression()


def batches(steps: int, size: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [steps, size, 7] and targets [steps, size, 5]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, size, 7, generator=generator), torch.randn(steps, size, 5, generator=generator)


def train_step(engine: Engine, x: torch.Tensor, y: torch.Tensor) -> None:
    """One optimizer step on x, y cut into the engine's micro-batches."""
    for x_micro, y_micro in zip(x.chunk(engine.accumulation), y.chunk(engine.accumulation), strict=True):
        engine.backward((engine(x_micro).float() - y_micro).square().mean())
        engine.step()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Engines on one rank by kind: `ddp`, or `zero-<stage>`; on the CPU unless `device` says otherwise."""
    torch.set_num_threads(1)
    made: list[Engine] = []

    def make(kind: str = "ddp", module: nn.Module | None = None, **options: object) -> Engine:
        engine, _, stage = kind.partition("-")
        options.setdefault("optimizer", Optimizer(lr=1e-2))
        options.setdefault("lr", lambda step: 1e-2)
        made.append(
            Engine(
                module or regression(),
                ranks=Ranks(),
                device=torch.device(options.pop("device", "cpu")),
                runtime=Runtime(
                    engine="ddp" if engine == "ddp" else "deepspeed",
                    precision=options.pop("precision", "fp32"),
                    compile=options.pop("compile", False),
                ),
                deepspeed=options.pop("deepspeed", {"zero_optimization": {"stage": int(stage or 0)}}),
                **options,
            )
        )
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def tiny_config(tiny_encoder: Path, pristine_store: Path) -> Callable[..., Config]:
    """`tiny_config(folder, "key=value", ..., run="run")`: the config of a tiny run in `folder`/`run`."""
    from . import tiny_run

    torch.set_num_threads(1)

    def make(folder: Path, *overrides: str, run: str = "run") -> Config:
        return tiny_run.make_config(folder, tiny_encoder, pristine_store, *overrides, run=run)

    return make


@pytest.fixture
def decoder(tiny_config: Callable[..., Config], tmp_path: Path) -> tuple[str, ...]:
    """Overrides that name a decoder with random weights."""
    from rae_fast.autoencoder.rae import build_rae

    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder/config.json").write_text(json.dumps(DECODER_CONFIG))
    named = f"stage_1.params.decoder_config_path={tmp_path / 'decoder'}"
    torch.manual_seed(0)
    rae = build_rae(tiny_config(tmp_path, named).stage_1, need_encoder=False)
    torch.save({n: v * 5 if v.ndim == 2 else v for n, v in rae.decoder.state_dict().items()}, tmp_path / "decoder.pt")
    return named, f"stage_1.params.pretrained_decoder_path={tmp_path / 'decoder.pt'}"
