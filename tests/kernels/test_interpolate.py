"""Training pairs from stored latents: the noise that rae_fast.rng draws, and the path's two equations."""

from __future__ import annotations

import pytest
import torch
from rae_kernels import interpolate as op

from rae_fast import rng
from rae_fast.rng import Stream

SEED, EPOCH = 3_000_000_000, 2_900_000_001
INDEX = torch.tensor([0, 7, 2**40 + 5])


def inputs(shape: tuple[int, int, int], *, quantized: bool) -> tuple:
    """Stored latents [3, *shape], scales, a factor and the path's coefficients."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, *shape, generator=generator)
    stored = (40 * z).round().clamp(-127, 127).to(torch.int8) if quantized else z.half()
    scale = 0.02 + 0.01 * torch.rand(3, shape[0], generator=generator).half() if quantized else None
    t = torch.tensor([0.0, 0.25, 0.9])
    path = torch.stack([1 - t, t, -torch.ones(3), torch.ones(3)], dim=1)
    return stored, scale, 0.5 if quantized else 1.0, path


def check(shape: tuple[int, int, int], device: str, *, quantized: bool, dtype: torch.dtype = torch.float32) -> None:
    made = inputs(shape, quantized=quantized)
    stored, scale, factor, path = (t.to(device) if isinstance(t, torch.Tensor) else t for t in made)
    index = INDEX.to(device)
    x, target = op.interpolate(
        stored, scale, factor, path, index, seed=SEED, epoch=EPOCH, stream=Stream.NOISE, dtype=dtype
    )
    noise = rng.normal(SEED, EPOCH, index, Stream.NOISE, shape)
    expected = op.reference(stored, scale, factor, path, noise, torch.float32)
    # A whole unit in the last place: Triton's interpreter truncates to bfloat16.
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    # Sample 0 is at t = 0: its x_t is the latent, so the difference can only be the noise of the others.
    torch.testing.assert_close(x.float(), expected[0], rtol=rounding, atol=rounding)
    torch.testing.assert_close(target, expected[1], rtol=2e-6, atol=2e-6)
    assert x.dtype == dtype and target.dtype == torch.float32


@pytest.mark.interpreter
@pytest.mark.parametrize("quantized", [False, True])
def test_pairs_are_made_of_the_noise_that_rng_draws(quantized: bool) -> None:
    check((6, 4, 5), "cpu", quantized=quantized)


@pytest.mark.interpreter
def test_bfloat16_latents_and_several_programs_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "DEFAULT_CONFIG", {"blocks": 32, "warps": 1})
    check((10, 4, 7), "cpu", quantized=True, dtype=torch.bfloat16)


def test_an_odd_number_of_elements_goes_to_plain_pytorch() -> None:
    check((3, 3, 3), "cpu", quantized=True)


@pytest.mark.parametrize("shape", [(), (3,), (4,), (5, 3)])
def test_the_generator_is_the_one_of_rng(shape: tuple[int, ...]) -> None:
    drawn = op.normal(SEED, EPOCH, INDEX, Stream.SAMPLE, shape)
    assert torch.equal(drawn, rng.normal(SEED, EPOCH, INDEX, Stream.SAMPLE, shape))


def test_the_registration_is_complete() -> None:
    arguments = (*inputs((2, 2, 2), quantized=True), INDEX, 1, 2, 3, torch.float32)
    torch.library.opcheck(op.interpolate_stored, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_on_a_gpu_are_made_of_the_noise_that_rng_draws(quantized: bool, dtype: torch.dtype) -> None:
    check((768, 16, 16), "cuda", quantized=quantized, dtype=dtype)
