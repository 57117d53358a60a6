"""The engine on a GPU: what it computes, that no step waits for the device, that a resumed run has the same bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rae_fast.config import Optimizer
from rae_fast.dit.registry import build_dit

from .conftest import batches, regression, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = ["ddp"] + [f"zero-{stage}" for stage in range(4)] * (importlib.util.find_spec("deepspeed") is not None)
TINY = {"hidden_size": [64, 64], "depth": [2, 1], "num_heads": [4, 4], "input_size": 4, "in_channels": 32}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_cpu(kind, make_engine):
    x, y = batches(6, 16)
    found = []
    for device in ("cpu", "cuda"):
        engine = make_engine("ddp" if device == "cpu" else kind, device=device, clip_grad=0.5, ema_decays=[0.9])
        for step in range(6):
            train_step(engine, x[step].to(device), y[step].to(device))
        found.append((engine.weights(), engine.ema_weights()))
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.allclose(value, theirs[name], atol=1e-5) for name, value in ours.items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero-3"])
@pytest.mark.parametrize("poison", [1.0, float("nan")])
def test_no_step_waits_for_the_device(kind, poison, make_engine):
    x, y = (values.cuda() for values in batches(4, 16))
    engine = make_engine(kind, device="cuda", clip_grad=1.0, ema_decays=[0.9, "power_0.1"], accumulation=2)
    train_step(engine, x[0], y[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            train_step(engine, x[step] * poison, y[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_has_the_same_bits(kind, make_engine, tmp_path):
    # Its files are safetensors, its restart DeepSpeed's or DDP's.
    from rae_fast.runtime import Ranks
    from rae_fast.training.checkpoint import Checkpointer

    x, y = (values.cuda() for values in batches(6, 16))
    engines = [
        make_engine(kind, module=regression(seed), device="cuda", clip_grad=1.0, ema_decays=[0.9]) for seed in (0, 0, 5)
    ]
    for step in range(6):
        train_step(engines[0], x[step], y[step])
    for step in range(3):
        train_step(engines[1], x[step], y[step])
    checkpointer = Checkpointer(tmp_path, Ranks())
    checkpointer.save(3, {"model": engines[1]}, {})
    train_step(engines[1], x[5], y[5])  # what the thread writes must be the weights of step 3
    checkpointer.wait()
    Checkpointer(tmp_path, Ranks()).restore({"model": engines[2]})
    for step in range(3, 6):
        train_step(engines[2], x[step], y[step])
    for state, flats in engines[0].flat_state().items():
        assert all(torch.equal(a, b) for a, b in zip(flats, engines[2].flat_state()[state], strict=True)), state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compiled_bfloat16_training_of_a_dit_learns_and_its_average_is_drawn_with(optimizer, make_engine):
    torch.manual_seed(0)
    model = build_dit("DiTDH", {**TINY, "num_classes": 8})
    engine = make_engine(
        module=model,
        device="cuda",
        precision="bf16",
        compile=True,
        optimizer=Optimizer(type=optimizer, lr=2e-3),
        lr=lambda step: 2e-3,
        clip_grad=1.0,
        ema_decays=[0.5],
    )
    z, y = torch.randn(8, 32, 4, 4, device="cuda"), torch.arange(8, device="cuda")
    losses = []
    for _ in range(60):
        loss = (engine(z, torch.full((8,), 0.5, device="cuda"), y).float() - z).square().mean()
        losses.append(loss.detach())
        engine.backward(loss)
        engine.step()
    assert losses[-1] < 0.5 * losses[0]
    with engine.ema_applied() as average, engine.autocast(), torch.no_grad():
        drawn = average(z, torch.full((8,), 0.5, device="cuda"), y)
    assert (drawn.float() - z).square().mean() < losses[0]
