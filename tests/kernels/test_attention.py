"""Packed attention: kernels against plain PyTorch in float64, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from rae_kernels import attention as op
from rae_kernels.attention import Given
from torch import Tensor

from .exactness import TOLERANCE, poison_new_tensors, relative_error


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
    poison_new_tensors(monkeypatch)
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


BF16, FP16 = torch.bfloat16, torch.float16
ON_GPU = [(width, tokens, BF16, False) for width in (64, 72, 128) for tokens in (100, 256, 1024)]
ON_GPU += [(72, 256, FP16, False), (64, 100, BF16, True), (128, 256, BF16, True), (72, 64, BF16, True)]


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "tokens", "dtype", "norm"), ON_GPU)
def test_a_gpu_matches_float64(
    monkeypatch: pytest.MonkeyPatch, width: int, tokens: int, dtype: torch.dtype, norm: bool
) -> None:
    poison_new_tensors(monkeypatch)
    check((3, tokens, 2, width), dtype, "cuda", norm=norm, again=True)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 72, 128])
def test_every_configuration_that_the_tuner_may_choose_is_right(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """A race or a wrong layout may show in one tiling only."""
    from rae_kernels.launches import Maker, Stack, attention_given
    from rae_kernels.tuner import candidates
    from rae_kernels.warm import Job, compile_ahead
    from triton.runtime.errors import OutOfResources

    stack, make = Stack(2 * width, 2, 0, False, torch.float32), Maker("cuda", 2, 256)
    directions = ("forward", "backward.queries", "backward.keys")
    trials = [(f"attention.{d}", config) for d in directions for config in candidates(f"attention.{d}", 256)]
    major, minor = torch.cuda.get_device_capability()
    compile_ahead([Job(name, stack, make._replace(device="meta"), c) for name, c in trials], 10 * major + minor)
    given, default = attention_given(stack, make), op.default_config
    monkeypatch.setattr(op.tuning, "table", dict)

    def run() -> dict[str, Tensor]:
        return results(given, lambda g: op.packed_attention(*g, 1e-6, True)[0])

    expected = run()
    for name, config in trials:
        chosen = {name.removeprefix("attention."): config}
        monkeypatch.setattr(op, "default_config", lambda d, *a, c=chosen: c.get(d) or default(d, *a))
        try:
            found, again = run(), run()
        except OutOfResources:
            continue
        for key, value in found.items():
            assert torch.equal(value, again[key]), (name, config, key)
            assert relative_error(value, expected[key].double()) <= 6e-3, (name, config, key)


@pytest.mark.gpu
def test_projections_of_more_than_two_to_the_31_elements_on_a_gpu() -> None:
    """Offsets that do not fit 32 bits: the last sample is computed as it is alone, forward and backward."""
    samples, tokens, heads, width = 1024, 1024, 16, 72
    needed = 9 * samples * tokens * 3 * heads * width
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    qkv = torch.zeros(samples, tokens, 3, heads, width, dtype=BF16, device="cuda")
    qkv[-1].normal_()
    angle = torch.rand(tokens, width // 2, device="cuda")
    upstream = torch.randn(1, tokens, heads * width, dtype=BF16, device="cuda")
    found = []
    for x, d_out in ((qkv, upstream.expand(samples, -1, -1).contiguous()), (qkv[-1:].clone(), upstream)):
        x.requires_grad_()
        out = op.packed_attention(x, None, None, None, angle.cos(), angle.sin(), 1e-6, True)[0]
        found.append((out[-1], torch.autograd.grad(out, x, d_out)[0][-1]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.gpu
def test_neither_rotation_nor_bias_on_a_gpu() -> None:
    check((1, 257, 2, 72), torch.bfloat16, "cuda", rope=False, bias=False, keep_turned=False)
