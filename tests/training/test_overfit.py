"""The whole chain can learn: 64 images by heart, from pixels to latents to DiT and back to pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.autoencoder.rae import build_rae
from rae_fast.autoencoder.trainer import train_decoder
from rae_fast.config_file import load_config
from rae_fast.demo.shapes import draw_picture
from rae_fast.geometry import resolve_geometry
from rae_fast.latents.writer import build_cache
from rae_fast.sampling import draw_images, load_sampler
from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log

IMAGES, SIDE, PATCH = 64, 32, 16
# Of few tokens, so that the steps that learning by heart takes are short.
ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIDE,
    "num_register_tokens": 1,
}
DECODER = {
    "decoder_hidden_size": 128,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 256,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
CONFIG = """
stage_1: {params: {encoder_input_size: 32, decoder_patch_size: 16, noise_tau: 0.05}}
stage_2:
  target: DiTDH
  params: {hidden_size: [128, 128], depth: [2, 2], num_heads: [4, 4], class_dropout_prob: 0.0}
transport: {params: {time_dist_type: logit-normal_0_1}}
misc: {time_dist_shift_base: 12}  # a shift of 4
sampler: {params: {num_steps: 30, grid: full}}
data: {threads: 1}
cache: {precision: fp32, pixels: true, views: [original]}
gan: {loss: {disc_weight: 0.0, perceptual_weight: 0.0}}
eval: {num_images: 8}
training:
  epochs: 100000
  global_batch_size: 64
  ema_decay: 0.99
  log_interval: 10
  checkpoint_interval: null
  sample_every: null
  clip_grad: null
  optimizer: {lr: 4.0e-3}
  scheduler: {type: wsd, warmup_steps: 50, warmup_from_zero: true}
runtime: {device: cpu, precision: fp32, engine: ddp}
"""
DECODER_STEPS, STEPS = 1000, 600


def draw_images_of_classes(folder: Path) -> np.ndarray:
    """One picture for each of 64 classes, as files; their pixels uint8 [64, 32, 32, 3]."""
    pictures = []
    for i in range(IMAGES):
        picture = draw_picture(0, "train", i).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        path = folder / f"class-{i:02d}/picture.png"
        path.parent.mkdir(parents=True)
        picture.save(path)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def write_encoder(folder: Path) -> None:
    """A frozen encoder with seeded random weights."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**ENCODER)).save_pretrained(folder)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixty_four_images_are_learned_by_heart(tmp_path):
    torch.set_num_threads(1)
    write_encoder(tmp_path / "encoder")
    real = draw_images_of_classes(tmp_path / "images")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "decoder.json").write_text(json.dumps(DECODER))
    shared = [
        f"stage_1.params.encoder_params.dinov2_path={tmp_path / 'encoder'}",
        f"stage_1.params.decoder_config_path={tmp_path / 'decoder.json'}",
        f"data.source={tmp_path / 'images'}",
        f"cache.path={tmp_path / 'store'}",
    ]

    def config(run: str, steps: int):
        own = [f"logging.run_folder={tmp_path / run}", f"training.max_steps={steps}"]
        return load_config(tmp_path / "config.yaml", [*shared, *own])

    build_cache(config("store", 1))
    decoder = train_decoder(config("decoder", DECODER_STEPS))
    train_dit(config("dit", STEPS))
    losses = [line["loss"] for line in read_log(tmp_path / "dit/log.jsonl")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}, {losses[-1] / losses[0]:.2%}")
    assert losses[-1] < 0.05 * losses[0]

    shared += [
        f"stage_2.ckpt={tmp_path / 'dit/export/stage2_model.pt'}",
        f"stage_1.params.pretrained_decoder_path={decoder['export']}",
        f"misc.num_classes={IMAGES}",
    ]
    drawing = config("samples", 1)
    sampler = load_sampler(drawing, resolve_geometry(drawing), torch.device("cpu"))
    rae = build_rae(drawing.stage_1, need_encoder=False).eval()
    drawn = draw_images(sampler, rae, np.arange(IMAGES), np.arange(IMAGES), seed=0)
    error = (drawn[:, None].astype(np.float64) - real[None].astype(np.float64)) ** 2
    psnr_db = 10 * np.log10(255**2 / error.mean((2, 3, 4)))
    nearest = psnr_db.argmax(1)
    print(f"PSNR to the nearest image: least {psnr_db.max(1).min():.1f} dB, mean {psnr_db.max(1).mean():.1f} dB")
    assert (nearest == np.arange(IMAGES)).all(), "each class draws its own image"
    assert psnr_db.max(1).min() >= 20
