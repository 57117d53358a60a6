from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rae_fast.config import Stage1, Stage1Params

CLASSES = {
    "dinov2": ("Dinov2withNorm", "dinov2_path"),
    "mae": ("MAEwNorm", "model_name"),
    "siglip2": ("SigLIP2wNorm", "model_name"),
}


def tiny_encoder_folder(family: str, folder: Path) -> Path:
    """A two-layer encoder of one head (diffusers knows only heads of 64) in Hugging Face's layout."""
    from transformers import (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTMAEConfig,
        ViTMAEModel,
    )

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2}
    if family == "dinov2":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, patch_size=14, image_size=518))
    elif family == "siglip2":
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, patch_size=16, image_size=256))
    else:
        model = ViTMAEModel(ViTMAEConfig(**sizes, patch_size=16, image_size=224))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.4, 0.45], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


@pytest.fixture(params=["dinov2", "mae"])  # what diffusers builds under any version of transformers
def stage1(request: pytest.FixtureRequest, tmp_path: Path) -> Stage1:
    """A tiny autoencoder on disk: encoder, decoder with random weights and diffusers' positions, statistics."""
    return make_stage1(request.param, tmp_path)


def make_stage1(family: str, folder: Path) -> Stage1:
    """As the fixture, of a given family."""
    from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder
    from rae_fast.interop.diffusers import decoder_json
    from rae_fast.interop.official import save_weights
    from rae_fast.latents.stats import save_statistics
    from rae_fast.patches import sincos_table
    from rae_fast.provenance import write_json

    encoder = tiny_encoder_folder(family, folder / "encoder")
    patch = 14 if family == "dinov2" else 16
    sizes = DecoderConfig(
        hidden_size=64,
        grid=3,
        patch_size=4,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=80,
    )
    torch.manual_seed(2)
    decoder = ViTDecoder(sizes)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name != "decoder_pos_embed":
                parameter.copy_(0.1 * torch.randn_like(parameter))
        decoder.decoder_pos_embed[:, 1:] = sincos_table(96, 3, 16 / 3)
    save_weights(folder / "model.pt", decoder.state_dict())
    write_json(folder / "decoder.json", decoder_json(sizes))
    save_statistics(folder / "stat.pt", torch.randn(64, 3, 3), 0.05 + torch.rand(64, 3, 3))
    encoder_cls, place = CLASSES[family]
    params = Stage1Params(
        encoder_cls=encoder_cls,
        encoder_input_size=3 * patch,
        encoder_params={place: str(encoder)},
        decoder_config_path=str(folder / "decoder.json"),
        decoder_patch_size=4,
        pretrained_decoder_path=str(folder / "model.pt"),
        noise_tau=0.0,
        normalization_stat_path=str(folder / "stat.pt"),
    )
    return Stage1(params=params)
