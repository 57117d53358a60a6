"""Drawing on a GPU: bits, waits, graphs and compilation. Needs torch alone, so that a bare machine runs it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from rae_fast.config import Config, Guidance, Misc, Runtime, SamplerParams, SamplerSection
from rae_fast.dit.registry import build_dit
from rae_fast.geometry import Geometry
from rae_fast.runtime import DTYPES, set_precision
from rae_fast.sampling import LatentSampler, draw_latents
from rae_fast.sampling.accelerate import CudaGraphs, accelerate, store_for_autocast

pytestmark = pytest.mark.gpu

LATENT, CLASSES, COUNT = (64, 8, 8), 5, 75
LABELS, INDEX = np.arange(COUNT) % CLASSES, np.arange(COUNT)
PARAMS = {"hidden_size": [128, 256], "depth": [3, 1], "num_heads": [2, 2], "num_classes": CLASSES}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    set_precision("fp32")
    yield
    set_precision("fp32")


def sampler_on_gpu(precision: str, *, compiled: bool = False, cuda_graphs: bool = False) -> LatentSampler:
    model = build_dit("DiTDH", {**PARAMS, "input_size": LATENT[1], "in_channels": LATENT[0]})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model = model.cuda().eval().requires_grad_(False)
    store_for_autocast(model, DTYPES[precision])
    accelerate(model, torch.device("cuda"), compiled=compiled, cuda_graphs=cuda_graphs)
    config = Config(
        sampler=SamplerSection("ODE", SamplerParams(num_steps=8)),
        guidance=Guidance("cfg", 2.0, 0.2, 0.9),
        misc=Misc(latent_size=list(LATENT), num_classes=CLASSES),
        runtime=Runtime(precision=precision),
    )
    return LatentSampler(model, config, Geometry(LATENT, 128, CLASSES, CLASSES, 1.0))


def drawn(sampler: LatentSampler, size: int, seed: int = 3) -> torch.Tensor:
    """All latents, drawn `size` at a time."""
    cuts = range(0, COUNT, size)
    return torch.cat([draw_latents(sampler, LABELS[i : i + size], INDEX[i : i + size], seed) for i in cuts])


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_latents_do_not_depend_on_the_batch(precision: str) -> None:
    set_precision(precision)
    sampler = sampler_on_gpu(precision)
    assert torch.equal(drawn(sampler, 7), drawn(sampler, 64))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_replay_the_bits_of_plain_passes(precision: str) -> None:
    plain, graphed = sampler_on_gpu(precision), sampler_on_gpu(precision, cuda_graphs=True)
    for seed in (0, 1):
        assert torch.equal(drawn(graphed, 32, seed), drawn(plain, 32, seed))
    recorded: CudaGraphs = graphed.model.forward
    # With and without the null branch: two sets of shapes.
    assert len(recorded._recordings) == 2 and not recorded._failed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_and_graphed_passes_agree_with_plain_ones(precision: str) -> None:
    plain, fast = sampler_on_gpu(precision), sampler_on_gpu(precision, compiled=True, cuda_graphs=True)
    expected = drawn(plain, 32)
    distance = float((drawn(fast, 32) - expected).norm() / expected.norm())
    assert distance < (1e-4 if precision == "fp32" else 4e-2)


def test_weights_kept_for_autocast_give_the_bits_of_autocast() -> None:
    kept, cast = sampler_on_gpu("bf16"), sampler_on_gpu("fp32")
    cast.config = kept.config
    assert torch.equal(drawn(kept, 32), drawn(cast, 32))


@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_steps_do_not_wait_for_the_gpu(mode: str) -> None:
    sampler = sampler_on_gpu("fp32")
    sampler.config = Config(
        sampler=SamplerSection(mode, SamplerParams(num_steps=8)),
        guidance=sampler.config.guidance,
        misc=sampler.config.misc,
        runtime=sampler.config.runtime,
    )
    labels, index = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.arange(4, device="cuda")
    noise = sampler.noise(index, 0)
    sampler.integrate(noise, labels, lambda step: sampler.noise(index, 0, step + 1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.integrate(noise, labels, lambda step: sampler.noise(index, 0, step + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
