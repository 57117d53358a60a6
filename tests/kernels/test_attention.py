"""Packed attention: kernels against plain PyTorch in float64, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from rae_kernels import attention as op
from rae_kernels.attention import Given
from torch import Tensor

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over the reference's, in float64; NaN anywhere gives NaN."""
    return ((result.double() - reference).norm() / reference.norm()).item()


def random_given(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, *, norm: bool, rope: bool, bias: bool
) -> Given:
    """Inputs for [B, N, H, D]; the projections are a view into a wider tensor, so that rows have gaps."""
    samples, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(tokens + width)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    qkv = draw(samples, tokens, 3 * heads * width + 16)[..., 8:-8].unflatten(-1, (3, heads, width))
    angle = draw(tokens, width // 2) * 3
    given = Given(
        qkv.to(dtype),
        draw(3 * heads * width) if bias else None,
        1 + 0.2 * draw(width) if norm else None,
        1 + 0.2 * draw(width) if norm else None,
        angle.cos() if rope else None,
        angle.sin() if rope else None,
    )
    return Given(*(None if t is None else t.to(device) for t in given))


def results(given: Given, run: object) -> dict[str, Tensor]:
    """Output and gradients of one run, by name."""
    inputs = [None if t is None else t.detach().requires_grad_(i < 4) for i, t in enumerate(given)]
    out = run(Given(*inputs))
    generator = torch.Generator().manual_seed(0)
    # The same numbers for every run, in the output's type.
    upstream = torch.randn(out.shape, generator=generator).half().to(out.device, out.dtype)
    present = {name: t for name, t in zip(Given._fields[:4], inputs[:4], strict=True) if t is not None}
    gradients = torch.autograd.grad(out, list(present.values()), upstream)
    return {"out": out} | {f"d_{name}": g for name, g in zip(present, gradients, strict=True)}


def check(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, *,
    norm: bool = False, rope: bool = True, bias: bool = True, keep_turned: bool = True, again: bool = False,
) -> None:  # fmt: skip
    """Values and gradients within the tolerance of float64, and no worse than twice plain PyTorch in the same type."""
    given = random_given(shape, dtype, device, norm=norm, rope=rope, bias=bias)
    exact = results(Given(*(None if t is None else t.double() for t in given)), lambda g: op.reference(g, 1e-6))
    eager = results(given, lambda g: op.reference(g, 1e-6))

    def run(g: Given) -> Tensor:
        return op.packed_attention(*g, 1e-6, keep_turned)[0]

    fast = results(given, run)
    for name, value in fast.items():
        error = relative_error(value, exact[name])
        assert error <= TOLERANCE[dtype], f"{name}: {error}"
        assert error <= 2 * relative_error(eager[name], exact[name]) + 1e-7, f"{name}: {error}"
    if again:
        assert all(torch.equal(value, fast[name]) for name, value in results(given, run).items())


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [64, 72, 128])
def test_odd_numbers_of_tokens_match_float64(width: int) -> None:
    check((1, 100, 2, width), torch.float32, "cpu", again=width == 72)


@pytest.mark.interpreter
def test_half_precision_matches_float64() -> None:
    check((1, 128, 1, 72), torch.float16, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("keep_turned", [False, True])
def test_norms_of_queries_and_keys(keep_turned: bool) -> None:
    check((2, 40, 2, 72), torch.float32, "cpu", norm=True, keep_turned=keep_turned)


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [12, 20])
def test_heads_narrower_than_a_matrix_instruction(width: int) -> None:
    check((1, 5, 3, width), torch.float32, "cpu", norm=True)


@pytest.mark.interpreter
def test_neither_rotation_nor_bias() -> None:
    check((3, 20, 1, 16), torch.float32, "cpu", rope=False, bias=False, keep_turned=False)


@pytest.mark.interpreter
def test_queries_and_keys_in_tiles_of_different_size(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"queries": 32, "keys": 16, "warps": 4, "stages": 2}
    monkeypatch.setattr(op, "default_config", lambda *_: tile)
    check((1, 70, 1, 24), torch.float32, "cpu", norm=True)


@pytest.mark.interpreter
def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    check((1, 70, 1, 72), torch.float32, "cpu", norm=True)


@pytest.mark.parametrize("norm", [False, True])
def test_the_registered_gradient_is_the_references_own(norm: bool) -> None:
    check((2, 9, 2, 12), torch.float32, "cpu", norm=norm)


@pytest.mark.parametrize("whole", [False, True])
def test_the_registration_is_complete(whole: bool) -> None:
    given = random_given((2, 6, 2, 8), torch.float32, "cpu", norm=whole, rope=whole, bias=whole)
    inputs = [None if t is None else t.requires_grad_(i < 4) for i, t in enumerate(given)]
    torch.library.opcheck(op.packed_attention, (*inputs, 1e-6, whole))


def test_a_shape_that_nobody_measured_goes_to_pytorchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.tuning, "_machine", lambda _: ("a GPU", "3.8"))
    device = torch.device("cuda", 0)
    assert op.chosen(256, 72, torch.bfloat16, device) == "sdpa"
    key = ("a GPU", "3.8", "attention", "tokens=256 head=72", "bfloat16")
    monkeypatch.setattr(op.tuning, "table", lambda: {key: {"implementation": "triton"}})
    assert op.chosen(256, 72, torch.bfloat16, device) == "triton"
    assert op.chosen(256, 72, torch.float32, device) == "sdpa"
