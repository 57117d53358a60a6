"""A tiny model with all weights random, in files, and the config that names them."""

import json
from pathlib import Path

import pytest
import torch

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.dit.registry import build_dit

DIT = {"hidden_size": [32, 32], "depth": [2, 1], "num_heads": [2, 2], "class_dropout_prob": 0.1}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "patch_size": 4,
}


def _randomize(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    encoder = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16
        )
    )
    encoder.save_pretrained(tmp_path / "encoder")
    mean_std = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "encoder/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BitImageProcessor", **mean_std})
    )
    (tmp_path / "decoder.json").write_text(json.dumps(DECODER))
    dit = build_dit("DiTDH", {**DIT, "input_size": 4, "in_channels": 16, "num_classes": 3})
    _randomize(dit)
    torch.save(dit.state_dict(), tmp_path / "dit.pt")
    from dataclasses import replace

    decoder = ViTDecoder(replace(load_decoder_config(tmp_path / "decoder.json"), hidden_size=16, grid=4, patch_size=4))
    _randomize(decoder)
    torch.save(decoder.state_dict(), tmp_path / "decoder.pt")
    return load_config(
        None,
        [
            f"stage_1.params.encoder_params.dinov2_path={tmp_path / 'encoder'}",
            "stage_1.params.encoder_input_size=16",
            f"stage_1.params.decoder_config_path={tmp_path / 'decoder.json'}",
            "stage_1.params.decoder_patch_size=4",
            f"stage_1.params.pretrained_decoder_path={tmp_path / 'decoder.pt'}",
            "stage_2.target=DiTDH",
            f"stage_2.ckpt={tmp_path / 'dit.pt'}",
            *(f"stage_2.params.{key}={value}" for key, value in DIT.items()),
            "misc.num_classes=3",
            "misc.time_dist_shift_base=256",
            "sampler.params.num_steps=4",
            "guidance.scale=2.0",
            "runtime.precision=fp32",
        ],
    )
