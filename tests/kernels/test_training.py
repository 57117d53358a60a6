"""Training with the kernels is training without them: loss curves, ZeRO, activation checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from rae_kernels import swiglu

from rae_fast.dit.fused import TORCH, TRITON, use_kernels

from .models import loss_curve, small_batch, small_model


def curves(steps: int, samples: int, changes: dict[str, object], **options: object) -> dict[str, torch.Tensor]:
    """Losses with plain PyTorch and with the kernels, from the same weights on the same batches."""
    found = {}
    for kernels in (TORCH, TRITON):
        model = small_model(**changes).to(options.get("device", "cpu"))
        use_kernels(model, kernels)
        found[kernels] = loss_curve(model, steps, samples, **options)
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("steps", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_training_through_the_kernels_gives_the_plain_loss_curve(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few programs, as the interpreter runs one after the other.
    monkeypatch.setattr(swiglu, "default_config", lambda _: {"rows": 64, "columns": 64, "warps": 1})
    found = curves(steps, 2, {"input_size": 2, "depth": [1, 1], "num_heads": [1, 1]})
    # Float32 on both sides: what differs is the order of additions, which AdamW's first steps amplify.
    torch.testing.assert_close(found[TRITON], found[TORCH], rtol=2e-3, atol=0.0)
    if steps == 100:
        assert found[TRITON][-10:].mean() < 0.8 * found[TRITON][:10].mean(), "nothing was learnt"


def gradients(kernels: str, checkpointing: bool) -> dict[str, torch.Tensor]:
    model = small_model()
    use_kernels(model, kernels)
    model.activation_checkpointing = checkpointing
    x, t, y, velocity = small_batch(model, 2, 0)
    (model(x, t, y) - velocity).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.interpreter
def test_activation_checkpointing_changes_no_bit_and_kernels_little() -> None:
    kept, recomputed, plain = gradients(TRITON, False), gradients(TRITON, True), gradients(TORCH, False)
    assert kept.keys() == plain.keys()
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name
        assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm() + 1e-9, name


@pytest.mark.interpreter
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_kernels_train_under_every_stage_of_zero(stage: int) -> None:
    pytest.importorskip("deepspeed")
    from rae_fast.config import Optimizer, Runtime
    from rae_fast.runtime import Ranks
    from rae_fast.training.engine import Engine

    found = {}
    for kernels, kind in ((TORCH, "ddp"), (TRITON, "deepspeed")):
        model = small_model(input_size=2)
        use_kernels(model, kernels)
        engine = Engine(
            model,
            ranks=Ranks(),
            device=torch.device("cpu"),
            runtime=Runtime(engine=kind, precision="fp32", compile=False, kernels=kernels),
            deepspeed={"zero_optimization": {"stage": stage}},
            optimizer=Optimizer(lr=1e-3),
            lr=lambda _step: 1e-3,
        )
        for step in range(2):
            x, t, y, velocity = small_batch(model, 2, step)
            engine.backward((engine(x, t, y).float() - velocity).square().mean())
            engine.step()
        found[kernels] = engine.weights()
        engine.close()
    assert found[TRITON].keys() == found[TORCH].keys()
    for name, weight in found[TORCH].items():
        # Adam's first steps have the size of the learning rate whatever the gradient's; a sign that rounding decides
        # may differ by two of them.
        assert (found[TRITON][name] - weight).abs().max() <= 4.1e-3, name
        assert (found[TRITON][name] - weight).norm() <= 2e-3 * weight.norm() + 1e-6, name


@pytest.mark.gpu
def test_a_hundred_bfloat16_steps_on_a_gpu_give_the_plain_loss_curve() -> None:
    changes = {"std": 0.05, "input_size": 8, "hidden_size": [144, 256], "num_heads": [2, 2]}
    found = curves(100, 32, changes, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(found[TRITON], found[TORCH], rtol=3e-2, atol=0.0)
    torch.testing.assert_close(found[TRITON].mean(), found[TORCH].mean(), rtol=5e-3, atol=0.0)
    assert found[TRITON][-10:].mean() < 0.9 * found[TRITON][:10].mean()
