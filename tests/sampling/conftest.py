"""A tiny model with all weights random, in files, and the config that names them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.config import Config
from rae_fast.dit.registry import build_dit

DIT = {"hidden_size": [32, 32], "depth": [2, 1], "num_heads": [2, 2], "class_dropout_prob": 0.1}
SIZES = {"input_size": 4, "in_channels": 16, "num_classes": 3}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "patch_size": 4,
}


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoder/, decoder.json, decoder.pt, dit.pt, guide.pt and images of three classes; read only."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(folder / "encoder")
    mean_std = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "encoder/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BitImageProcessor", **mean_std})
    )
    (folder / "decoder.json").write_text(json.dumps(DECODER))
    for seed, name in enumerate(("dit", "guide")):
        dit = build_dit("DiTDH", {**DIT, **SIZES})
        randomize(dit, seed)
        torch.save(dit.state_dict(), folder / f"{name}.pt")
    decoder = ViTDecoder(replace(load_decoder_config(folder / "decoder.json"), hidden_size=16, grid=4, patch_size=4))
    randomize(decoder, 0)
    torch.save(decoder.state_dict(), folder / "decoder.pt")
    random = np.random.default_rng(0)
    for i in range(7):
        coarse = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        path = folder / "photos" / ("cross", "ring", "star")[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((24 + i, 20), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def settings(model_files: Path) -> list[str]:
    """The config as key=value."""
    return [
        f"stage_1.params.encoder_params.dinov2_path={model_files / 'encoder'}",
        "stage_1.params.encoder_input_size=16",
        f"stage_1.params.decoder_config_path={model_files / 'decoder.json'}",
        "stage_1.params.decoder_patch_size=4",
        f"stage_1.params.pretrained_decoder_path={model_files / 'decoder.pt'}",
        "stage_2.target=DiTDH",
        f"stage_2.ckpt={model_files / 'dit.pt'}",
        *(f"stage_2.params.{key}={value}" for key, value in DIT.items()),
        "misc.num_classes=3",
        "misc.time_dist_shift_base=256",
        "sampler.params.num_steps=4",
        "guidance.scale=2.0",
        "runtime.device=cpu",
        "runtime.precision=fp32",
    ]


@pytest.fixture(scope="session")
def config(settings: list[str]) -> Config:
    from rae_fast.config_file import load_config  # not at the top: a bare GPU machine has no omegaconf

    return load_config(None, settings)
