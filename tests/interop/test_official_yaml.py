"""Every kind of configuration file of bytetriper/RAE: read as it is, its models built, or refused with the two keys.

The files are written here from what is known of them: their keys, spellings and values, branch by branch.
"""

from __future__ import annotations

import json
from math import prod, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.autoencoder.discriminator import RECIPES
from rae_fast.autoencoder.objective import Starts
from rae_fast.config import Config
from rae_fast.config_file import load_config, to_yaml
from rae_fast.dit.registry import build_dit
from rae_fast.encoders import encoder_facts
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, dit_params, resolve_geometry
from rae_fast.transport.grid import time_grid
from rae_fast.transport.objective import Transport

ENCODERS = {
    "DINOv2-B": ("Dinov2withNorm", {"dinov2_path": "facebook/dinov2-with-registers-base", "normalize": True}, 224),
    "DINOv2-B_512": ("Dinov2withNorm", {"dinov2_path": "facebook/dinov2-with-registers-base", "normalize": True}, 448),
    "MAE": ("MAEwNorm", {"model_name": "facebook/vit-mae-base"}, 256),
    "SigLIP2": ("SigLIP2wNorm", {"model_name": "google/siglip2-base-patch16-256", "num_tokens": 256}, 256),
}
DITDH = {
    "patch_size": 1,
    "in_channels": 768,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "use_qknorm": False,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "wo_shift": False,
    "use_pos_embed": True,
}
SIZES = {
    "XL": {"hidden_size": [1152, 2048], "depth": [28, 2], "num_heads": [16, 16]},
    "S": {"hidden_size": [384, 2048], "depth": [12, 2], "num_heads": [6, 16]},
}
PARAMETERS = {("XL", 16): 838_675_796, ("S", 16): 196_455_764}


def stage_1(encoder: str, *, training: bool = False) -> dict[str, Any]:
    """The section as the files have it; decoder training starts without weights and statistics."""
    encoder_cls, params, size = ENCODERS[encoder]
    name = params.get("dinov2_path") or params["model_name"]
    section = {
        "encoder_cls": encoder_cls,
        "encoder_config_path": name,
        "encoder_input_size": size,
        "encoder_params": params,
        "decoder_config_path": "configs/decoder/ViTXL",
        "noise_tau": 0.8 if training else 0.0,
        "reshape_to_2d": True,
    }
    if not training:
        section["pretrained_decoder_path"] = "models/decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
        section["normalization_stat_path"] = "models/stats/dinov2/wReg_base/imagenet1k/stat.pt"
    return {"target": "stage1.RAE", "params": section}


def stage_2(size: str, grid: int, *, trained: bool = False) -> dict[str, Any]:
    section: dict[str, Any] = {
        "target": "stage2.models.DDT.DiTwDDTHead",
        "params": {"input_size": grid, **SIZES[size], **DITDH},
    }
    return {**section, "ckpt": f"models/DiTs/DiTDH-{size}/stage2_model.pt"} if trained else section


def shared(grid: int) -> dict[str, Any]:
    """The sections of training and sampling files alike."""
    return {
        "transport": {
            "params": {
                "path_type": "Linear",
                "prediction": "velocity",
                "loss_weight": None,
                "time_dist_type": "logit-normal_0_1",
            }
        },
        "sampler": {
            "mode": "ODE",
            "params": {"sampling_method": "euler", "num_steps": 50, "atol": "1e-6", "rtol": "1e-3", "reverse": False},
        },
        "misc": {
            "latent_size": [768, grid, grid],
            "num_classes": 1000,
            "time_dist_shift_dim": 768 * grid * grid,
            "time_dist_shift_base": 4096,
        },
    }


GUIDANCE_OFF = {"method": "cfg", "scale": 1.0, "t_min": 0.0, "t_max": 1.0}
OPTIMIZER = {"type": "AdamW", "lr": 2.0e-4, "betas": [0.9, 0.95], "weight_decay": 0.0, "eps": 1.0e-8}
LEGACY_LR = {
    "base_lr": 2.0e-4,
    "final_lr": 2.0e-5,
    "beta": [0.9, 0.95],
    "wd": 0.0,
    "schedule_type": "linear",
    "decay_start_epoch": 40,
    "decay_end_epoch": 800,
}


def stage_2_training(size: str = "XL", encoder: str = "DINOv2-B", grid: int = 16) -> dict[str, Any]:
    """Main branch: stage2/training/ImageNet256."""
    return {
        "stage_1": stage_1(encoder),
        "stage_2": stage_2(size, grid),
        **shared(grid),
        "guidance": GUIDANCE_OFF,
        "training": {
            "epochs": 1400,
            "global_batch_size": 1024,
            "grad_accum_steps": 1,
            "ema_decay": 0.9995,
            "num_workers": 8,
            "log_interval": 100,
            "checkpoint_interval": 4,
            "sample_every": 2500,
            "clip_grad": 1.0,
            "global_seed": 42,
            "optimizer": OPTIMIZER,
            "scheduler": {
                "type": "linear",
                "warmup_epochs": 40,
                "decay_end_epoch": 800,
                "base_lr": 2.0e-4,
                "final_lr": 2.0e-5,
                "warmup_from_zero": False,
            },
        },
        "eval": {"eval_interval": 25000, "eval_model": False, "data_path": "val", "reference_npz_path": "ref.npz"},
    }


def contradictory_512() -> dict[str, Any]:
    """Main branch: stage2/training/ImageNet512, with flat keys and the sizes of 256 px."""
    config = stage_2_training(encoder="DINOv2-B_512")
    general = ("epochs", "global_batch_size", "ema_decay", "num_workers", "clip_grad", "global_seed")
    kept = {key: config["training"][key] for key in general}
    config["training"] = {**kept, **LEGACY_LR, "log_every": 100, "ckpt_every": 5000, "sample_every": 10000}
    return config


def mended_512() -> dict[str, Any]:
    """The same, once its three sizes are those of 448 / 14 tokens."""
    config = contradictory_512()
    config["stage_2"]["params"]["input_size"] = 32
    config["misc"].update(latent_size=[768, 32, 32], time_dist_shift_dim=768 * 32 * 32)
    return config


def deprecated_training() -> dict[str, Any]:
    """Deprecated branch: everything counted in steps, uniform times."""
    config = contradictory_512()
    config["stage_1"] = stage_1("DINOv2-B")
    config["transport"]["params"] |= {"time_dist_type": "uniform", "time_dist_shift": 6.93}
    return config


def sampling(grid: int = 16, *, guided: bool = True) -> dict[str, Any]:
    """Main branch: stage2/sampling, with dashes in the guidance section."""
    size = "DINOv2-B" if grid == 16 else "DINOv2-B_512"
    config = {"stage_1": stage_1(size), "stage_2": stage_2("XL", grid, trained=True), **shared(grid)}
    if not guided:
        return {**config, "guidance": {"method": "cfg", "scale": 1.0, "t-min": 0.0, "t-max": 1.0}}
    guide = stage_2("S", grid, trained=True)
    scale = 1.42 if grid == 16 else 1.5
    guidance = {"method": "autoguidance", "scale": scale, "t-min": 0.0, "t-max": 1.0, "guidance_model": guide}
    return {**config, "guidance": guidance}


def stage_1_training(encoder: str, *, betas: list[float] | None = None, **training: object) -> dict[str, Any]:
    """Main branch: stage1/training; XLA has other betas and a batch per process."""
    schedule = {
        "type": "cosine",
        "warmup_epochs": 1,
        "decay_end_epoch": 16,
        "base_lr": 2.0e-4,
        "final_lr": 2.0e-5,
        "warmup_from_zero": True,
    }
    optimizer = {"type": "adamw", "lr": 2.0e-4, "beta": betas or [0.9, 0.95], "wd": 0.0}
    return {
        "stage_1": stage_1(encoder, training=True),
        "training": {
            "epochs": 16,
            "ema_decay": 0.9978,
            "num_workers": 8,
            "clip_grad": 0.0,
            "log_interval": 100,
            "sample_every": 1250,
            "checkpoint_interval": 4,
            "global_seed": 0,
            "optimizer": dict(optimizer),
            "scheduler": dict(schedule),
            **(training or {"global_batch_size": 512}),
        },
        "gan": {
            "disc": {
                "arch": {
                    "dino_ckpt_path": "models/discs/dino_vit_small_patch8_224.pth",
                    "ks": 9,
                    "norm_type": "bn",
                    "using_spec_norm": True,
                    "recipe": "S_8",
                },
                "optimizer": dict(optimizer),
                "scheduler": dict(schedule),
                "augment": {"prob": 1.0, "cutout": 0.0},
            },
            "loss": {
                "disc_loss": "hinge",
                "gen_loss": "vanilla",
                "disc_weight": 0.75,
                "perceptual_weight": 1.0,
                "disc_start": 8,
                "disc_upd_start": 6,
                "lpips_start": 0,
                "max_d_weight": 10000.0,
                "disc_updates": 1,
            },
        },
        "eval": {"eval_interval": 5000, "eval_model": True, "data_path": "val", "metrics": ["psnr", "ssim", "rfid"]},
    }


def lightning_training() -> dict[str, Any]:
    """None is shipped; its constructor's arguments in the same file."""
    config = stage_2_training()
    numbers = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "learn_sigma": False, "use_gembed": True}
    params = {name: value for name, value in DITDH.items() if name != "use_pos_embed"}
    config["stage_2"] = {
        "target": "stage2.models.lightningDiT.LightningDiT",
        "params": {"input_size": 16, **params, **numbers},
    }
    return config


FILES: dict[str, tuple[dict[str, Any], int]] = {
    "stage1/training/DINOv2-B": (stage_1_training("DINOv2-B"), 16),
    "stage1/training/DINOv2-B_512": (stage_1_training("DINOv2-B_512"), 32),
    "stage1/training/MAE": (stage_1_training("MAE"), 16),
    "stage1/training/SigLIP2": (stage_1_training("SigLIP2"), 16),
    "stage1/pretrained/DINOv2-B": ({"stage_1": stage_1("DINOv2-B")}, 16),
    "stage1/pretrained/DINOv2-B_512": ({"stage_1": stage_1("DINOv2-B_512")}, 32),
    "stage1/pretrained/MAE": ({"stage_1": stage_1("MAE")}, 16),
    "stage1/pretrained/SigLIP2": ({"stage_1": stage_1("SigLIP2")}, 16),
    "stage2/training/ImageNet256/DiTDH-XL": (stage_2_training(), 16),
    "stage2/training/ImageNet256/DiTDH-S": (stage_2_training("S"), 16),
    "stage2/training/ImageNet256/DiTDH-XL_MAE": (stage_2_training(encoder="MAE"), 16),
    "stage2/training/LightningDiT": (lightning_training(), 16),
    "stage2/training/ImageNet512, mended": (mended_512(), 32),
    "stage2/sampling/ImageNet256": (sampling(guided=False), 16),
    "stage2/sampling/ImageNet256-AG": (sampling(), 16),
    "stage2/sampling/ImageNet512-AG": (sampling(32), 32),
    "deprecated/stage1": (stage_1_training("DINOv2-B", batch_size=64, log_every=100, ckpt_every=5000), 16),
    "deprecated/stage2": (deprecated_training(), 16),
    "XLA/stage1": (stage_1_training("DINOv2-B", betas=[0.5, 0.9], batch_size=64), 16),
    "XLA/stage2": (stage_2_training("S"), 16),
}


def load(folder: Path, content: dict[str, Any]) -> tuple[Config, Geometry]:
    file = folder / "official.yaml"
    # PyYAML takes 1e-6 for a text, which is how the files are written.
    file.write_text(yaml.safe_dump(content, sort_keys=False).replace("'1e-6'", "1e-6").replace("'1e-3'", "1e-3"))
    config = load_config(file)
    assert load_config(yaml.safe_load(to_yaml(config))) == config
    return config, resolve_geometry(config)


@pytest.mark.parametrize("name", FILES)
def test_official_files_load_and_their_models_are_built(tmp_path: Path, name: str) -> None:
    content, grid = FILES[name]
    config, geometry = load(tmp_path, content)
    assert geometry.latent_shape == (768, grid, grid)
    assert geometry.image_size == 16 * grid
    assert geometry.shift == pytest.approx(sqrt(prod(geometry.latent_shape) / 4096))
    params = config.stage_1.params
    facts = encoder_facts(params.encoder_cls, params=params.encoder_params, config_path=params.encoder_config_path)
    assert (facts.hidden_size, facts.grid(params.encoder_input_size)) == (768, grid)
    with torch.device("meta"):
        sizes = load_decoder_config(params.decoder_config_path)
        assert sum(p.numel() for p in ViTDecoder(sizes).parameters()) == 415_352_704
        if "stage_2" in content:
            model = build_dit(config.stage_2.target, dit_params(config, geometry))
            assert model.num_classes == 1000
            model.check_latents(torch.empty(1, *geometry.latent_shape))
            size = "XL" if config.stage_2.params["depth"] == [28, 2] else "S"
            if "Lightning" not in name and (size, grid) in PARAMETERS:
                assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size, grid]
        guide = config.guidance.guidance_model
        if guide is not None:
            assert build_dit(guide.target, guide.params).grid == grid


def test_values_arrive_where_they_are_used(tmp_path: Path) -> None:
    config, geometry = load(tmp_path, sampling())
    assert (config.guidance.scale, config.guidance.t_min, config.guidance.t_max) == (1.42, 0.0, 1.0)
    assert (config.sampler.params.atol, config.sampler.params.rtol) == (1e-6, 1e-3)
    assert geometry.null_label == 1000
    transport = Transport.from_config(config, geometry.latent_shape)
    assert time_grid(config.sampler.params.num_steps, config.sampler.params.grid, transport.shift)[-1] == pytest.approx(
        0.0069, abs=1e-4
    )
    config, _ = load(tmp_path, stage_2_training())
    assert (config.training.optimizer.type, config.training.optimizer.betas) == ("adamw", [0.9, 0.95])
    assert config.training.scheduler.decay_end_epoch == 800
    assert config.transport.params.time_dist_type == "logit-normal_0_1"


@pytest.mark.parametrize("file", [deprecated_training(), mended_512()], ids=["deprecated", "512"])
def test_flat_keys_mean_what_the_sections_mean(tmp_path: Path, file: dict[str, Any]) -> None:
    training = load(tmp_path, file)[0].training
    sections = load(tmp_path, stage_2_training())[0].training
    assert (training.optimizer, training.scheduler) == (sections.optimizer, sections.scheduler)
    assert (training.log_interval, training.checkpoint_every, training.sample_every) == (100, 5000, 10000)


def test_aliases_of_both_players_optimizers(tmp_path: Path) -> None:
    config, _ = load(tmp_path, stage_1_training("DINOv2-B", betas=[0.5, 0.9], batch_size=64))
    for section in (config.training, config.gan.disc):
        assert (section.optimizer.betas, section.optimizer.weight_decay) == ([0.5, 0.9], 0.0)
        assert (section.scheduler.type, section.scheduler.warmup_from_zero) == ("cosine", True)
    assert config.training.batch_size == 64
    assert config.gan.disc.arch.recipe in RECIPES
    starts = Starts.of(config.gan.loss, steps_per_epoch=100, images_per_step=64)
    assert (starts.perceptual, starts.discriminator, starts.adversarial) == (0, 600, 800)


def test_the_contradictory_512_px_file_is_refused_with_both_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, contradictory_512())
    said = str(caught.value)
    assert "misc.latent_size is [768, 16, 16]" in said and "encoder_input_size 448 / patch 14 = 32x32" in said
    half_mended = contradictory_512()
    half_mended["misc"] = {"num_classes": 1000}
    with pytest.raises(UserError, match=r"stage_2\.params\.input_size is 16.*encoder_input_size 448 / patch 14"):
        load(tmp_path, half_mended)


def test_the_stray_quote_of_the_xla_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "DINOv2-B_512.yaml"
    file.write_text(yaml.safe_dump({"stage_1": stage_1("DINOv2-B_512")}).replace("ViTXL", "ViTXL'", 1) + "x: 'open\n")
    with pytest.raises(UserError, match=r"DINOv2-B_512\.yaml cannot be read") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_decoder_configs_write_sizes_as_text(tmp_path: Path) -> None:
    """As configs/decoder/*/config.json do, on which transformers 5 stops."""
    (tmp_path / "config.json").write_text(
        '{"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "patch_size": "16", "image_size": "256",'
        ' "decoder_hidden_size": 1152, "decoder_intermediate_size": 4096, "decoder_num_attention_heads": 16,'
        ' "decoder_num_hidden_layers": "28", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": true}'
    )
    assert load_decoder_config(tmp_path) == load_decoder_config("configs/decoder/ViTXL")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"decoder_num_attention_heads": 0}, "decoder_num_attention_heads is 0; expected a whole number above 0"),
        ({"decoder_num_hidden_layers": -1}, "decoder_num_hidden_layers is -1"),
        ({"decoder_hidden_size": "wide"}, "decoder_hidden_size is 'wide'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_decoder_configs_that_cannot_be_are_refused(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    sizes = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **entry}))
    with pytest.raises(UserError, match=said):
        load_decoder_config(tmp_path)
