from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.dit.registry import build_dit
from rae_fast.geometry import Geometry
from rae_fast.sampling.accelerate import accelerate
from rae_fast.sampling.sampler import LatentSampler, draw_latents
from rae_fast.xla.device import compilations, fallbacks

ROOT = Path(__file__).resolve().parents[2]
PARAMS = {"input_size": 4, "in_channels": 16, "hidden_size": 32, "depth": [2, 1], "num_heads": 2, "num_classes": 3}
SETTINGS = ["sampler.params.num_steps=6", "runtime.precision=fp32", "misc.time_dist_shift_base=64"]
LABELS, INDEX = np.arange(8) % 3, np.arange(8)
GUIDANCE = {
    "none": [],
    "cfg": ["guidance.scale=2.0", "guidance.t_min=0.3", "guidance.t_max=0.95"],
    "autoguidance": ["guidance.method=autoguidance", "guidance.scale=1.5", "guidance.guidance_model.ckpt=unread"],
    "sde": ["sampler.mode=SDE", "guidance.scale=2.0"],
    "heun": ["sampler.params.sampling_method=heun", "sampler.params.grid=full"],
}


def random_dit(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    dit = build_dit("DiTDH", PARAMS).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    return dit


def sampler_on(device: torch.device, config: Config, geometry: Geometry) -> LatentSampler:
    models = [random_dit(seed).to(device) for seed in (0, 1)]
    for model in models:
        accelerate(model, device, compiled=False, cuda_graphs=False)
    return LatentSampler(models[0], config, geometry, models[1], rows=8)


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return Geometry(latent_shape=(16, 4, 4), image_size=32, num_classes=3, null_label=3, shift=1.0)


@pytest.mark.parametrize("name", GUIDANCE)
def test_eight_samples_equal_the_cpus(device: torch.device, geometry: Geometry, name: str) -> None:
    config = load_config(None, [*SETTINGS, *GUIDANCE[name]])
    expected = draw_latents(sampler_on(torch.device("cpu"), config, geometry), LABELS, INDEX, seed=5)
    sampler = sampler_on(device, config, geometry)
    found = draw_latents(sampler, LABELS, INDEX, seed=5).cpu()
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    before = compilations()
    again = draw_latents(sampler, LABELS, INDEX + 8, seed=5).cpu()
    assert compilations() == before, "a second batch compiled something"
    assert not torch.equal(again, found)


def test_no_operation_of_the_sampler_falls_back(device: torch.device, geometry: Geometry) -> None:
    assert fallbacks() == []


def test_reconstruction_equals_the_cpus(
    device: torch.device, run_config: Callable[..., Config], tmp_path: Path
) -> None:
    from rae_fast.autoencoder.rae import build_rae

    decoder = f"stage_1.params.decoder_config_path={ROOT / 'configs/decoder/demo/config.json'}"
    rae = build_rae(run_config(tmp_path, decoder).stage_1).eval().requires_grad_(False)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    latents, decoded = rae.encode(images), rae.decode(rae.encode(images))
    rae.to(device)
    found = rae.encode(images.to(device))
    assert float((found.cpu() - latents).norm() / latents.norm()) <= 1e-5
    assert float((rae.decode(found).cpu() - decoded).norm() / decoded.norm()) <= 1e-5
