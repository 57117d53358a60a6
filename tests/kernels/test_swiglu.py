"""SwiGLU's gate and the linear map behind it: values and gradients against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rae_kernels import swiglu as op
from torch import Tensor

from .exactness import TOLERANCE, poison_new_tensors, relative_error

NAMES = ("x12", "bias", "weight", "weight_bias")


def random_inputs(rows: int, hidden: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(hidden)
    shapes = [(2, rows, 2 * hidden), (2 * hidden,), (width, hidden), (width,)]
    scales = [2.0, 1.0, hidden**-0.5, 1.0]
    return [(s * torch.randn(n, generator=generator)).to(device, dtype) for n, s in zip(shapes, scales, strict=True)]


def results(inputs: list[Tensor], run: object) -> dict[str, Tensor]:
    """Output and gradients of one run, by name."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).half().to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return {"out": out} | {f"d_{name}": g for name, g in zip(NAMES, gradients, strict=True)}


def plain(x12: Tensor, bias: Tensor, weight: Tensor, weight_bias: Tensor) -> Tensor:
    return F.linear(op.reference(x12, bias), weight, weight_bias)


def check(rows: int, hidden: int, dtype: torch.dtype, device: str) -> None:
    """Values and gradients within the tolerance of float64, no worse than twice plain PyTorch, equal when repeated."""
    inputs = random_inputs(rows, hidden, 24, dtype, device)
    exact, eager = results([t.double() for t in inputs], plain), results(inputs, plain)
    fast, again = results(inputs, op.gated_linear), results(inputs, op.gated_linear)
    for name, value in fast.items():
        error = relative_error(value, exact[name])
        assert error <= TOLERANCE[dtype], f"{name}: {error}"
        assert error <= 2 * relative_error(eager[name], exact[name]) + 1e-7, f"{name}: {error}"
        assert torch.equal(value, again[name]), name


@pytest.mark.interpreter
@pytest.mark.parametrize("hidden", [100, 1365])
def test_odd_hidden_widths_match_float64(hidden: int) -> None:
    check(5, hidden, torch.float32, "cpu")


@pytest.mark.interpreter
def test_many_programs_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "default_config", lambda _: {"rows": 4, "columns": 32, "warps": 1})
    check(9, 72, torch.float16, "cpu")


@pytest.mark.interpreter
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_tensors(monkeypatch)
    check(3, 40, torch.float32, "cpu")


def test_the_registered_gradient_is_the_references_own() -> None:
    check(4, 20, torch.float32, "cpu")


def test_the_registration_is_complete() -> None:
    inputs = [t.requires_grad_() for t in random_inputs(3, 8, 6, torch.float32, "cpu")]
    torch.library.opcheck(op.gated_linear, tuple(inputs))
    torch.library.opcheck(op.gated_linear, (inputs[0], None, inputs[2], None))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1024, 1365, 3072, 5504])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_matches_float64(monkeypatch: pytest.MonkeyPatch, hidden: int, dtype: torch.dtype) -> None:
    poison_new_tensors(monkeypatch)
    check(100, hidden, dtype, "cuda")
