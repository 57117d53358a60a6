"""AdamW and moving averages in one pass: torch's AdamW, a lerp and a cast are the oracle."""

from __future__ import annotations

import pytest
import torch
from rae_kernels import adamw_ema as op
from torch import Tensor

DECAYS = (0.9995, 0.9, 0.0)
HYPERPARAMETERS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def draw(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def by_torch(gradients: list[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
    """Parameters and averages after torch's own steps, in float64."""
    param = torch.nn.Parameter(draw(0, count).double())
    averages = [param.detach().clone() for _ in DECAYS]
    optimizer = torch.optim.AdamW([param], **HYPERPARAMETERS)
    for gradient in gradients:
        param.grad = gradient.double()
        optimizer.step()
        for average, decay in zip(averages, DECAYS, strict=True):
            average.lerp_(param.detach(), 1 - decay)
    return param.detach(), averages


def check(count: int, device: str, grad_dtype: torch.dtype) -> None:
    """Four steps, clipped by a factor on the device, with a third that the guard leaves out."""
    gradients = [draw(k, count).to(grad_dtype) for k in range(1, 5)]
    clip, bad = 0.5, 2
    param, averages = by_torch([g.float() * clip for k, g in enumerate(gradients) if k != bad], count)
    state = [draw(0, count).to(device), torch.zeros(count, device=device), torch.zeros(count, device=device)]
    ours = [state[0].clone() for _ in DECAYS]
    copy = torch.empty(count, dtype=torch.float16, device=device)
    step = 0
    for k, gradient in enumerate(gradients):
        found = torch.tensor([float(k == bad)], device=device)
        poisoned = gradient.to(device) if k != bad else torch.full_like(gradient, float("nan")).to(device)
        step += k != bad
        op.adamw_ema(
            state[0], poisoned, state[1], state[2], ours, DECAYS, step=step,
            grad_scale=torch.tensor([clip], device=device), found_inf=found, copy_P=copy, **HYPERPARAMETERS,
        )  # fmt: skip
    # Rounded once a step to float32, relative to parameters of order one.
    torch.testing.assert_close(state[0].cpu().double(), param, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(ours, averages, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(copy, state[0].half())


@pytest.mark.interpreter
def test_steps_are_torchs_and_a_bad_gradient_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "DEFAULT_CONFIG", {"block": 64, "warps": 1})
    check(150, "cpu", torch.float16)


def test_plain_pytorch_steps_are_torchs() -> None:
    check(150, "cpu", torch.float32)


@pytest.mark.interpreter
def test_neither_average_nor_copy_nor_guard() -> None:
    param, gradient = draw(0, 70), draw(1, 70)
    state = [param.clone(), torch.zeros(70), torch.zeros(70)]
    op.adamw_ema(state[0], gradient, state[1], state[2], [], [], step=1, **HYPERPARAMETERS)
    expected, _ = by_torch([gradient], 70)
    torch.testing.assert_close(state[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_registration_is_complete() -> None:
    tensors = [draw(k, 8).abs() for k in range(4)]
    numbers = ([0.9], 1, 1e-3, 0.9, 0.95, 1e-8, 0.0)
    copy, average = torch.empty(8, dtype=torch.float16), draw(5, 8)
    torch.library.opcheck(op.step_in_place, (*tensors, [average], copy, torch.ones(1), torch.zeros(1), *numbers))


def test_a_decay_for_each_average_is_asked_for() -> None:
    with pytest.raises(ValueError, match="1 averages with 0 decays"):
        op.adamw_ema(*[draw(0, 4)] * 4, [draw(0, 4)], [], step=1, **HYPERPARAMETERS)


@pytest.mark.gpu
def test_steps_on_a_gpu_are_torchs() -> None:
    check(100_003, "cuda", torch.bfloat16)
