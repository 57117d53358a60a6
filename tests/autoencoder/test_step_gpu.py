"""Decoder training on a GPU: the CPU's numbers in float32, finite and near in bfloat16 with compiled blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rae_fast.autoencoder.assembly import RunPlan, build_players
from rae_fast.autoencoder.batch import DecoderBatch
from rae_fast.autoencoder.objective import Phase
from rae_fast.autoencoder.step import FIGURES
from rae_fast.config import (
    Config,
    Discriminator,
    DiscriminatorArch,
    Gan,
    GanLoss,
    Optimizer,
    Runtime,
    Stage1,
    Stage1Params,
    Training,
)
from rae_fast.runtime import Ranks
from rae_fast.training.batching import BatchPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DINO = {"depth": 2, "embed_dim": 64, "num_heads": 2, "patch_size": 8, "image_size": 64}
DECODER = {
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}
ENCODER = {"model_type": "dinov2_with_registers", "hidden_size": 32, "patch_size": 8, "num_hidden_layers": 2}
ALL_ON = Phase(perceptual=True, adversarial=True, discriminator=True)
COUNT, GRID, STEPS = 4, 8, 3


class Blur(nn.Module):
    """Stands in for LPIPS: the distance of averages."""

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(recon - target, 4).square().mean()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**ENCODER, **DECODER}))
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    return tmp_path


def figures_on(device: torch.device, folder: Path, **runtime: object) -> list[dict[str, float]]:
    """Figures of the first steps from the same weights, latents and draws."""
    params = Stage1Params(
        encoder_params={"dinov2_path": str(folder)},
        encoder_input_size=8 * GRID,
        decoder_config_path=str(folder),
        decoder_patch_size=8,
    )
    config = Config(
        stage_1=Stage1(params=params),
        gan=Gan(
            disc=Discriminator(arch=DiscriminatorArch(recipe=DINO, key_depths=[0], ks=9)),
            loss=GanLoss(disc_weight=0.75, perceptual_weight=1.0),
        ),
        training=Training(global_batch_size=COUNT, optimizer=Optimizer(lr=2e-4)),
        runtime=Runtime(engine="ddp", **runtime),
    )
    plan = RunPlan(BatchPlan(COUNT, 1, COUNT), Ranks(), device, steps_per_epoch=1, total_steps=STEPS)
    players = build_players(config, plan, Blur())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(COUNT, GRID * GRID, 32, generator=generator).to(device)
    images = torch.rand(COUNT, 3, 8 * GRID, 8 * GRID, generator=generator).to(device)
    batch = DecoderBatch(tokens, images, torch.arange(COUNT, device=device), 0)
    return [dict(zip(FIGURES, players.update([batch], step, ALL_ON).tolist(), strict=True)) for step in range(STEPS)]


def test_steps_are_the_cpu_s_in_float32(folder: Path) -> None:
    on_cpu, on_gpu = (figures_on(torch.device(kind), folder, precision="fp32") for kind in ("cpu", "cuda"))
    for step, (ours, theirs) in enumerate(zip(on_gpu, on_cpu, strict=True)):
        for name, value in theirs.items():
            # Later steps start from weights in which Adam has made a step of every rounding error.
            assert ours[name] == pytest.approx(value, rel=2e-4 if step == 0 else 2e-2, abs=1e-6), (step, name)


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_is_near_and_finite(folder: Path, compiled: bool) -> None:
    exact = figures_on(torch.device("cuda"), folder, precision="fp32")
    rough = figures_on(torch.device("cuda"), folder, precision="bf16", compile=compiled)
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours["l1"] == pytest.approx(theirs["l1"], rel=2e-2) and ours["skipped"] == 0
        assert ours["disc_loss"] == pytest.approx(theirs["disc_loss"], rel=1e-1)
        assert ours["adaptive_weight"] == pytest.approx(theirs["adaptive_weight"], rel=2e-1)
