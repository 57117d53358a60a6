"""Muon beside AdamW: which parameters it takes, that it is torch's, and that the engine's guards hold for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rae_fast.config import Optimizer
from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.training.checkpoint import Checkpointer
from rae_fast.training.optimizers import block_matrices

from .conftest import Regression, batches, regression, train_step

MUON = Optimizer(type="muon", lr=1e-2, weight_decay=0.1)


class Blocks(Regression):
    """The regression with two hidden layers in a list, as blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.SiLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(nn.functional.silu(self.first(x * self.scale + self.offset)))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


def blocks(seed: int = 0) -> Blocks:
    torch.manual_seed(seed)
    return Blocks()


def test_muon_takes_the_matrices_of_blocks_only():
    assert set(block_matrices(blocks())) == {"blocks.0.0.weight", "blocks.1.0.weight"}


def test_steps_are_those_of_torchs_muon_and_adamw(make_engine):
    x, y = batches(5, 8)
    engine = make_engine(module=blocks(), optimizer=MUON, clip_grad=0.5)
    module = blocks()
    matrices = list(block_matrices(module).values())
    rest = [p for p in module.parameters() if p.requires_grad and all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        train_step(engine, x[step], y[step])
        module.zero_grad()
        (module(x[step]) - y[step]).square().mean().backward()
        nn.utils.clip_grad_norm_([*matrices, *rest], 0.5)
        muon.step()
        adamw.step()
    found = engine.weights()
    # Orthogonalization runs in bfloat16: where a last bit differs, a weight moves by its rounding.
    assert all(torch.allclose(found[n], p, atol=2e-4) for n, p in module.named_parameters())


def test_a_step_of_muon_that_is_not_finite_changes_nothing(make_engine):
    x, y = batches(3, 8)
    engine = make_engine(module=blocks(), optimizer=MUON, ema_decays=[0.9])
    train_step(engine, x[0], y[0])
    before = {kind: [t.clone() for t in flats] for kind, flats in engine.flat_state().items()}
    steps = engine.scalar_state()["optimizer_steps"]
    train_step(engine, x[1] * float("nan"), y[1])
    assert engine.record[2] == 1
    assert engine.scalar_state()["optimizer_steps"] == steps == 1
    for kind, flats in engine.flat_state().items():
        assert all(torch.equal(now, then) for now, then in zip(flats, before[kind], strict=True)), kind
    train_step(engine, x[2], y[2])
    assert not torch.equal(engine.flat_state()["master"][-1], before["master"][-1])


def test_run_with_muon_resumes_to_the_same_bits(make_engine, tmp_path):
    x, y = batches(6, 8)
    engines = [make_engine(module=blocks(seed), optimizer=MUON, ema_decays=[0.9]) for seed in (0, 0, 9)]
    for step in range(6):
        train_step(engines[0], x[step], y[step])
    for step in range(3):
        train_step(engines[1], x[step], y[step])
    Checkpointer(tmp_path, Ranks(), background=False).save(3, {"model": engines[1]}, {})
    Checkpointer(tmp_path, Ranks()).restore({"model": engines[2]})
    for step in range(3, 6):
        train_step(engines[2], x[step], y[step])
    for kind, flats in engines[0].flat_state().items():
        assert all(torch.equal(a, b) for a, b in zip(flats, engines[2].flat_state()[kind], strict=True)), kind
    with pytest.raises(UserError, match=r"made by optimizer\.type muon; expected adamw"):
        Checkpointer(tmp_path, Ranks()).restore({"model": make_engine(module=blocks(), ema_decays=[0.9])})


def test_muon_keeps_no_second_moment_of_matrices(make_engine):
    engine = make_engine(module=blocks(), optimizer=MUON)
    sizes = dict(zip(engine.shards.shapes, (len(t) for t in engine.flat_state()["exp_avg_sq"]), strict=True))
    assert sizes["blocks.0.0.weight"] == 0
    assert sizes["first.weight"] == 7 * 16


@pytest.mark.parametrize(
    ("kind", "module", "settings", "match"),
    [
        ("zero-1", blocks, MUON, r"muon with runtime\.engine=deepspeed"),
        ("ddp", regression, MUON, "no matrix in a block"),
        ("ddp", blocks, Optimizer(type="muno"), "did you mean 'muon'"),
    ],
)
def test_muon_where_it_cannot_work_is_refused(kind, module, settings, match, make_engine):
    with pytest.raises(UserError, match=match):
        make_engine(kind, module=module(), optimizer=settings)
