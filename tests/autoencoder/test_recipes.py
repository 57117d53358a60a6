"""The decoder recipes load, and their sections agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rae_fast
from rae_fast.autoencoder.assembly import disc_scheduler
from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.autoencoder.discriminator import RECIPES as RECIPES_OF_DINO
from rae_fast.autoencoder.discriminator import DinoBackbone, build_heads
from rae_fast.autoencoder.objective import Starts
from rae_fast.config_file import load_config
from rae_fast.geometry import resolve_geometry
from rae_fast.runtime import Ranks
from rae_fast.training.batching import plan_batches
from rae_fast.training.schedule import build_schedule

FOLDER = Path(rae_fast.__file__).parents[1] / "configs" / "stage1" / "training"
STEPS_PER_EPOCH = 2502  # of ImageNet at batch 512
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_recipes_for_every_encoder_family() -> None:
    names = {path.stem.split("_")[0] for path in RECIPES}
    assert names >= {"DINOv2-S", "DINOv2-B", "DINOv2-L", "DINOv3-L", "SigLIP2-B", "MAE-B"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_consistent_and_says_what_it_needs(path: Path) -> None:
    config = load_config(path, [])
    geometry = resolve_geometry(config)
    assert geometry.image_size == (512 if "_512" in path.stem else 256)
    assert load_decoder_config(str(config.stage_1.params.decoder_config_path)).decoder_num_hidden_layers in (12, 24, 28)
    assert config.cache.pixels and plan_batches(config.training, Ranks(world=1)).global_batch % 128 == 0
    loss = config.gan.loss
    starts = Starts.of(loss, steps_per_epoch=STEPS_PER_EPOCH, images_per_step=512)
    assert starts.discriminator is not None
    scheduler = disc_scheduler(config.gan.disc.scheduler, starts.discriminator, STEPS_PER_EPOCH)
    schedule = build_schedule(scheduler, lr=2e-4, steps_per_epoch=STEPS_PER_EPOCH)
    assert schedule(0) < 1e-6 and schedule(10 * STEPS_PER_EPOCH) == pytest.approx(2e-5)
    head = path.read_text().splitlines()[:12]
    assert all(any(line.startswith(f"# {word}") for line in head) for word in ("Hardware:", "Hours:", "Expected:"))
    for tool in ("python tools/build_cache.py", "deepspeed tools/train_decoder.py"):
        assert f"#   {tool} --config configs/stage1/training/{path.name}" in head


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_s_models_can_be_built(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[2])
    config = load_config(path, [])
    geometry, params, arch = resolve_geometry(config), config.stage_1.params, config.gan.disc.arch
    channels, grid, _ = geometry.latent_shape
    sizes = load_decoder_config(str(params.decoder_config_path))
    size = geometry.image_size
    with torch.device("meta"):
        decoder = ViTDecoder(replace(sizes, hidden_size=channels, grid=grid, patch_size=params.decoder_patch_size))
        image = decoder.unpatchify(decoder(torch.empty(1, grid * grid, channels)))
        backbone = DinoBackbone(RECIPES_OF_DINO[arch.recipe][0], arch.key_depths)
        heads = build_heads(replace(arch, using_spec_norm=False), backbone)  # autocast knows no meta device
        logits = heads(backbone(image))
    assert image.shape == (1, 3, size, size) and logits.shape == (1, 5 * 28 * 28)
    assert sum(parameter.numel() for parameter in heads.parameters()) == 7_386_245
    if (channels, grid) == (768, 16) and "decS" not in path.stem:
        count = sum(parameter.numel() for parameter in decoder.parameters())
        assert count == {768: 86_435_328, 1024: 304_150_272, 1152: 415_352_704}[sizes.decoder_hidden_size]
