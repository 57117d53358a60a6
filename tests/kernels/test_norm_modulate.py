"""Gated residual, norm and modulation: kernels against plain PyTorch in float64, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from rae_kernels import norm_modulate as op
from rae_kernels.norm_modulate import Terms
from torch import Tensor

from .exactness import TOLERANCE, poison_new_tensors, relative_error

NAMES = ("x", "branch", "gate", "bias", "scale", "shift", "weight")


def random_terms(
    shape: tuple[int, int, int], *, per_token: bool, form: str, stream: torch.dtype, dtype: torch.dtype, device: str
) -> Terms:
    """Inputs of one form, modulations as the strided chunks of one projection that a block sees."""
    samples, tokens, width = shape
    generator = torch.Generator().manual_seed(samples * tokens + width)

    def draw(*size: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(to).to(device)

    shift, scale, gate = draw(samples, tokens if per_token else 1, 3 * width).chunk(3, dim=-1)
    x, weight, bias = draw(*shape, to=stream), 1 + 0.1 * draw(width), draw(width)
    # A transposed view: the rows of the branch do not lie one after the other.
    branch = draw(tokens, samples, width).transpose(0, 1)
    terms = {
        "whole": Terms(x, branch, gate, bias, scale, shift, weight),
        "no shift, weight, bias": Terms(x, branch, gate, None, scale, None, None),
        "norm": Terms(x, None, None, None, scale, shift, weight),
        "residual": Terms(x, branch, gate, bias),
    }[form]
    return Terms(*(None if t is None else t.requires_grad_() for t in terms))


def results(terms: Terms, *, layer_norm: bool, dtype: torch.dtype, run: object) -> dict[str, Tensor]:
    """Outputs and gradients of one run, by name."""
    inputs = Terms(*(None if t is None else t.detach().requires_grad_() for t in terms))
    x_new, y = run(inputs, layer_norm, dtype)
    generator = torch.Generator().manual_seed(0)
    outputs = {"x_new": x_new} if terms.branch is not None else {}
    outputs |= {"y": y} if terms.scale is not None else {}
    weights = {k: torch.randn(v.shape, generator=generator).to(v.device) for k, v in outputs.items()}
    # Upstream gradients in the outputs' type, so that every run receives the same numbers.
    upstream = [w.to(torch.float16).to(outputs[k].dtype) for k, w in weights.items()]
    present = [t for t in inputs if t is not None]
    gradients = torch.autograd.grad(list(outputs.values()), present, upstream)
    names = [name for name, t in zip(NAMES, inputs, strict=True) if t is not None]
    return outputs | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}


def run_registered(terms: Terms, layer_norm: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The registered operation, whichever kernel the device gives it."""
    x_new, y, _, _ = op.residual_norm_modulate(*terms, 1e-6, layer_norm, dtype)
    return x_new, y


def run_reference(terms: Terms, layer_norm: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return op.reference(terms, 1e-6, layer_norm, dtype)


def check(
    shape: tuple[int, int, int], per_token: bool, form: str, layer_norm: bool,
    dtype: torch.dtype, stream: torch.dtype, device: str,
) -> None:  # fmt: skip
    """Values and gradients within the tolerance of float64, and no worse than twice plain PyTorch in the same types."""
    terms = random_terms(shape, per_token=per_token, form=form, stream=stream, dtype=dtype, device=device)
    exact_terms = Terms(*(None if t is None else t.detach().double() for t in terms))
    exact = results(exact_terms, layer_norm=layer_norm, dtype=torch.float64, run=run_reference)
    eager = results(terms, layer_norm=layer_norm, dtype=dtype, run=run_reference)
    fast = results(terms, layer_norm=layer_norm, dtype=dtype, run=run_registered)
    again = results(terms, layer_norm=layer_norm, dtype=dtype, run=run_registered)
    assert fast.keys() == exact.keys()
    # A GPU's reciprocal square root is good to 2 units in the last place.
    slack = 1e-7 if device == "cpu" else 3e-7
    for name, value in fast.items():
        error = relative_error(value, exact[name])
        assert error <= TOLERANCE[dtype], f"{name}: {error}"
        assert error <= 2 * relative_error(eager[name], exact[name]) + slack, f"{name}: {error}"
        assert torch.equal(value, again[name]), name


FORMS = ("whole", "no shift, weight, bias", "norm", "residual")


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_token", [False, True])
def test_values_and_gradients_match_float64_at_odd_sizes(form: str, per_token: bool) -> None:
    check((3, 10, 100), per_token, form, per_token, torch.float32, torch.float32, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [384, 1152])
def test_half_precision_branch_on_a_float32_stream(width: int) -> None:
    check((2, 5, width), False, "whole", False, torch.float16, torch.float32, "cpu")


@pytest.mark.interpreter
def test_half_precision_stream_with_layer_norm_per_token() -> None:
    check((1, 7, 2048), True, "whole", True, torch.float16, torch.float16, "cpu")


@pytest.mark.interpreter
def test_several_programs_a_sample_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "default_config", lambda *_: {"rows": 4, "warps": 1})
    check((2, 10, 48), False, "whole", False, torch.float32, torch.float32, "cpu")
    check((2, 10, 48), True, "whole", False, torch.float32, torch.float32, "cpu")


@pytest.mark.interpreter
def test_every_output_is_written_and_nothing_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_tensors(monkeypatch)
    check((2, 6, 100), False, "whole", True, torch.float32, torch.float32, "cpu")
    check((2, 6, 100), True, "whole", False, torch.float32, torch.float32, "cpu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_token", [False, True])
def test_the_registered_gradient_is_the_references_own(form: str, per_token: bool) -> None:
    check((2, 6, 20), per_token, form, per_token, torch.float32, torch.float32, "cpu")


@pytest.mark.parametrize("form", FORMS)
def test_the_registration_is_complete(form: str) -> None:
    fp32 = torch.float32
    terms = random_terms((2, 4, 16), per_token=False, form=form, stream=fp32, dtype=fp32, device="cpu")
    torch.library.opcheck(op.residual_norm_modulate, (*terms, 1e-6, False, torch.float32))


def test_a_wrong_number_of_modulation_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "use_triton", lambda _: True)
    x = torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match="modulation of 3 tokens for rows of 6"):
        op.norm_modulate(x, torch.randn(2, 3, 16))


@pytest.mark.interpreter
@pytest.mark.parametrize(("samples", "width", "per_token"), [(3, 384, False), (1, 1152, False), (1, 2048, True)])
def test_widths_of_models_match_float64_in_float32(samples: int, width: int, per_token: bool) -> None:
    check((samples, 100, width), per_token, "whole", False, torch.float32, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("width", "dtype", "stream"),
    [
        (384, torch.bfloat16, torch.float32),
        (1152, torch.bfloat16, torch.bfloat16),
        (2048, torch.float16, torch.float16),
        (1152, torch.float32, torch.float32),
    ],
)
def test_a_gpu_matches_float64(
    monkeypatch: pytest.MonkeyPatch, form: str, per_token: bool, width: int, dtype: torch.dtype, stream: torch.dtype
) -> None:
    poison_new_tensors(monkeypatch)
    check((3, 100, width), per_token, form, per_token, dtype, stream, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("samples", "tokens", "width", "per_token"), [(1, 1, 1152, False), (8, 256, 1152, False), (3, 256, 2048, True)]
)
def test_sizes_of_models_on_a_gpu_match_float64(samples: int, tokens: int, width: int, per_token: bool) -> None:
    check((samples, tokens, width), per_token, "whole", False, torch.bfloat16, torch.float32, "cuda")


@pytest.mark.gpu
def test_tensors_of_more_than_two_to_the_31_elements_on_a_gpu() -> None:
    """Offsets that do not fit 32 bits: the last sample is computed as it is alone."""
    samples, tokens, width = 1024, 1024, 2304
    needed = 8 * samples * tokens * width
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    x = torch.zeros(samples, tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_()
    scale, shift = torch.randn(2, samples, 1, width, device="cuda", dtype=torch.bfloat16)
    y = op.norm_modulate(x, scale, shift)
    assert torch.equal(y[-1:], op.norm_modulate(x[-1:].clone(), scale[-1:], shift[-1:]))
