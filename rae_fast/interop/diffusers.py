"""`AutoencoderRAE` of diffusers, both ways.

Three things differ from the reference:
- diffusers divides latents by (std + 1e-5), the reference by sqrt(var + eps);
- diffusers' decoder has fixed sine-cosine positions, which span 0 to 16 for any grid; the reference's start
  with a span of the grid, so that they agree on 16 x 16 tokens only, and training changes them;
- attention is named otherwise.

Shapes: C latent channels, H and W latent sides, D decoder width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder
from rae_fast.autoencoder.rae import RAE
from rae_fast.encoders.base import FrozenEncoder
from rae_fast.errors import UserError
from rae_fast.interop.official import save_safetensors, save_weights
from rae_fast.latents.stats import save_statistics
from rae_fast.patches import sincos_table
from rae_fast.provenance import atomic_write, read_json, write_json
from rae_fast.weights import load_strictly, read_weights_file

STD_OFFSET = 1e-5  # diffusers adds it to the standard deviation
VAR_EPS = 1e-5  # the reference adds it to the variance
POSITIONS = "decoder_pos_embed"
POSITION_SPAN = 16
POSITION_TOLERANCE = 1e-6
WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"

# What a folder's config.json and weights must have.
SIZES = (
    "encoder_hidden_size",
    "encoder_patch_size",
    "encoder_num_hidden_layers",
    "encoder_input_size",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
    "patch_size",
)
CONFIG_KEYS = ("encoder_type", *SIZES)
TENSORS = ("_latents_mean", "_latents_std", "encoder_mean", "encoder_std")

# Ours (the reference's) -> diffusers'.
RENAMED = {
    ".attention.attention.query.": ".attention.to_q.",
    ".attention.attention.key.": ".attention.to_k.",
    ".attention.attention.value.": ".attention.to_v.",
    ".attention.output.dense.": ".attention.to_out.0.",
}
# transformers' model_type -> (diffusers' encoder_type, the reference's encoder_cls, key of the encoder's place)
FAMILIES = {
    "dinov2_with_registers": ("dinov2", "Dinov2withNorm", "dinov2_path"),
    "vit_mae": ("mae", "MAEwNorm", "model_name"),
    "siglip_vision_model": ("siglip2", "SigLIP2wNorm", "model_name"),
}
# diffusers builds the encoder from its sizes alone, so the rest must be what transformers takes by default.
ENCODER_FACTS = (
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    "num_register_tokens",
    "use_swiglu_ffn",
)


def rename_to_diffusers(name: str) -> str:
    """A decoder tensor's name in diffusers."""
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def rename_from_diffusers(name: str) -> str:
    """A decoder tensor's name in the reference."""
    for ours, theirs in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


# --- ours to diffusers ----------------------------------------------------------------------------------------------


def to_diffusers(rae: RAE) -> nn.Module:
    """A `diffusers.AutoencoderRAE` that encodes and decodes like `rae`, in evaluation mode.

    In memory it has the decoder's own positions, whatever they are; `export_diffusers` says what a file can keep.

    Raises:
        UserError: diffusers is not installed, or cannot express this encoder or decoder.
    """
    model = _build(rae)
    assert rae.decoder is not None
    model.decoder.decoder_pos_embed.copy_(rae.decoder.decoder_pos_embed.detach())
    return model


def _build(rae: RAE) -> Any:
    """`rae` in diffusers, with diffusers' own fixed positions."""
    model_class = _autoencoder_class()
    encoder, decoder = _check_expressible(rae)
    mean, std = _latent_statistics(rae)
    sizes = decoder.config
    arguments = {
        "encoder_type": FAMILIES[encoder.model.config.model_type][0],
        "encoder_hidden_size": encoder.hidden_size,
        "encoder_patch_size": encoder.patch_size,
        "encoder_num_hidden_layers": encoder.num_layers,
        "decoder_hidden_size": sizes.decoder_hidden_size,
        "decoder_num_hidden_layers": sizes.decoder_num_hidden_layers,
        "decoder_num_attention_heads": sizes.decoder_num_attention_heads,
        "decoder_intermediate_size": sizes.decoder_intermediate_size,
        "patch_size": sizes.patch_size,
        "encoder_input_size": encoder.input_size,
        "encoder_norm_mean": list(encoder.image_mean),
        "encoder_norm_std": list(encoder.image_std),
        "latents_mean": mean,
        "latents_std": std,
        "noise_tau": rae.noise_tau,
    }
    try:
        model = model_class(**arguments)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"diffusers cannot build this autoencoder with encoder_type {arguments['encoder_type']!r}: {error}",
            "an encoder that the installed versions of diffusers and transformers support",
        ) from error
    _check_encoder_config(encoder, model.encoder)
    load_strictly(model, _diffusers_tensors(rae, encoder, decoder, mean, std), "this autoencoder", "see diffusers")
    return model.eval()


def export_diffusers(rae: RAE, folder: str | Path, *, drop_positions: bool = False) -> None:
    """Write a folder for `AutoencoderRAE.from_pretrained`.

    The decoder's positions are kept in the file, where `import_diffusers` finds them; diffusers passes them over.

    Args:
        rae: with encoder and decoder.
        folder: where to.
        drop_positions: write it even though the decoder's positions were trained, so that diffusers, which has fixed
            ones, decodes differently.

    Raises:
        UserError: see `to_diffusers`; or the positions were trained and may not be dropped.
    """
    model, decoder, folder = _build(rae), rae.decoder, Path(folder)
    assert decoder is not None
    table, fixed = decoder.decoder_pos_embed.detach().cpu(), model.decoder.decoder_pos_embed
    off = (table - fixed)[:, 1:].abs().max().item()
    if off > POSITION_TOLERANCE and not drop_positions:
        raise UserError(
            f"the decoder's positions are up to {off:.2g} from those of diffusers: they were trained, or the grid of "
            f"{decoder.config.grid} x {decoder.config.grid} is not the {POSITION_SPAN} x {POSITION_SPAN} of its table",
            "diffusers' own positions, as it has no others",
            "give --drop-positions to write it all the same: diffusers will then decode differently",
        )
    with torch.no_grad():
        # The class token is only ever seen with its position added: what was trained of that moves into the token.
        model.decoder.trainable_cls_token += (table - fixed)[:, :1]
    model.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    kept = torch.cat([fixed[:, :1], table[:, 1:]], dim=1)
    tensors = read_weights_file(folder / WEIGHTS)
    save_safetensors(folder / WEIGHTS, {**tensors, f"decoder.{POSITIONS}": kept}, {"format": "pt"})


def _autoencoder_class() -> Any:
    try:
        from diffusers import AutoencoderRAE
    except ImportError as error:
        raise UserError(
            f"diffusers with AutoencoderRAE is not installed: {error}", "diffusers", "pip install -U diffusers"
        ) from error
    return AutoencoderRAE


def _check_expressible(rae: RAE) -> tuple[FrozenEncoder, ViTDecoder]:
    """Encoder and decoder, if diffusers has their kind."""
    if rae.encoder is None or rae.decoder is None:
        raise UserError("an autoencoder without encoder or decoder", "both: diffusers keeps them in one folder")
    encoder, decoder = rae.encoder, rae.decoder
    family = getattr(getattr(encoder.model, "config", None), "model_type", type(encoder.model).__name__)
    if family not in FAMILIES:
        raise UserError(f"encoder of type {family}", f"one of {', '.join(FAMILIES)}: diffusers has no others")
    if encoder.final_norm is not None or encoder.layers != (encoder.num_layers - 1,):
        raise UserError("encoder_params with normalize: false or with layers", "the last layer, normalized")
    default = DecoderConfig()
    for name in ("layer_norm_eps", "qkv_bias", "hidden_act", "num_channels"):
        if getattr(decoder.config, name) != getattr(default, name):
            raise UserError(
                f"decoder with {name} {getattr(decoder.config, name)}", f"{getattr(default, name)}, as in diffusers"
            )
    return encoder, decoder


def _check_encoder_config(encoder: FrozenEncoder, theirs: nn.Module) -> None:
    for name in ENCODER_FACTS:
        ours, builds = getattr(encoder.model.config, name, None), getattr(theirs.config, name, None)
        if ours != builds:
            raise UserError(f"encoder with {name} {ours}", f"{builds}: diffusers builds encoders from sizes alone")


def _latent_statistics(rae: RAE) -> tuple[Tensor | None, Tensor]:
    """(mean, std) [C, H, W] with std + 1e-5 = sqrt(var + eps)."""
    assert rae.encoder is not None
    shape = (rae.encoder.hidden_size, rae.encoder.grid, rae.encoder.grid)
    mean = None if rae.latent_mean is None else rae.latent_mean.cpu().expand(shape).contiguous()
    if rae.latent_mean is None and rae.latent_var is None:
        divisor = torch.ones(1, dtype=torch.float64)
    else:
        var = torch.ones(1) if rae.latent_var is None else rae.latent_var.cpu()
        divisor = torch.sqrt(var.double() + rae.eps).expand(shape)
    return mean, (divisor - STD_OFFSET).float().contiguous()


def _diffusers_tensors(
    rae: RAE, encoder: FrozenEncoder, decoder: ViTDecoder, mean: Tensor | None, std: Tensor
) -> dict[str, Tensor]:
    tensors = {
        "encoder_mean": rae.pixel_mean,
        "encoder_std": rae.pixel_std,
        "_latents_mean": torch.zeros(1) if mean is None else mean,
        "_latents_std": std,
    }
    tensors.update({f"encoder.{name}": value for name, value in encoder.model.state_dict().items()})
    for name, value in decoder.state_dict().items():
        if name != POSITIONS:
            tensors[f"decoder.{rename_to_diffusers(name)}"] = value
    return tensors


# --- diffusers to ours ----------------------------------------------------------------------------------------------


def import_diffusers(source: str | Path, folder: str | Path) -> Path:
    """Write an `AutoencoderRAE` folder in the reference's layout; diffusers itself is not needed.

        encoder/             config.json, model.safetensors, preprocessor_config.json
        decoder/             config.json, model.pt
        stat.pt              mean, var
        stage_1.yaml         the section `stage_1` that names them

    Args:
        source: folder with config.json and diffusion_pytorch_model.safetensors.
        folder: where to.

    Returns:
        Path of stage_1.yaml.

    Raises:
        UserError: a file is missing or no AutoencoderRAE, its tensors do not fit its config, or it is of a kind that
            the reference cannot express.
    """
    source, folder = Path(source), Path(folder)
    config = read_json(source / "config.json")
    kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if kind != "AutoencoderRAE":
        raise UserError(f"{source / 'config.json'} is of a {kind}", "an AutoencoderRAE")
    _require(config, CONFIG_KEYS, source / "config.json")
    if not config.get("reshape_to_2d", True):
        raise UserError(f"{source}: reshape_to_2d is false", "latents [C, H, W]")
    tensors = _read_tensors(source)
    _require(tensors, TENSORS, source / WEIGHTS)
    family = next((name for name, facts in FAMILIES.items() if facts[0] == config["encoder_type"]), None)
    if family is None:
        raise UserError(f"{source}: encoder_type {config['encoder_type']!r}", "dinov2, mae or siglip2")
    for key in SIZES:
        if not isinstance(config[key], int) or config[key] < 1:
            raise UserError(f"{source / 'config.json'}: {key} is {config[key]!r}", "a whole number above 0")
    grid = config["encoder_input_size"] // config["encoder_patch_size"]
    decoder = _import_decoder(source, config, tensors, grid)
    mean, var = _import_statistics(source, config, tensors, grid)
    _write_encoder(folder / "encoder", family, config, tensors)
    write_json(folder / "decoder" / "config.json", decoder_json(decoder.config))
    save_weights(folder / "decoder" / "model.pt", decoder.state_dict())
    save_statistics(folder / "stat.pt", mean, var)
    return _write_section(folder, family, config, decoder.config)


def _require(found: Mapping[str, Any], names: Sequence[str], file: Path) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing[:3])}", "what diffusers writes", "the folder is incomplete")


def _read_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from shards."""
    if not (source / INDEX).is_file():
        return read_weights_file(source / WEIGHTS)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(read_json(source / INDEX)["weight_map"].values())):
        tensors.update(read_weights_file(source / name))
    return tensors


def _import_decoder(source: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], grid: int) -> ViTDecoder:
    decoder = ViTDecoder(
        DecoderConfig(
            hidden_size=config["encoder_hidden_size"],
            grid=grid,
            patch_size=config["patch_size"],
            num_channels=config.get("num_channels", 3),
            decoder_hidden_size=config["decoder_hidden_size"],
            decoder_num_hidden_layers=config["decoder_num_hidden_layers"],
            decoder_num_attention_heads=config["decoder_num_attention_heads"],
            decoder_intermediate_size=config["decoder_intermediate_size"],
        )
    )
    prefix = "decoder."
    found = {
        rename_from_diffusers(name.removeprefix(prefix)): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    # Absent, unless we wrote the file.
    patches = sincos_table(config["decoder_hidden_size"], grid, POSITION_SPAN / grid)
    found.setdefault(POSITIONS, torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1))
    load_strictly(decoder, found, source / WEIGHTS, "config.json and weights are not of the same model")
    return decoder


def _import_statistics(
    source: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], grid: int
) -> tuple[Tensor, Tensor]:
    """mean and var with sqrt(var + 1e-5) = (std + 1e-5) / scaling_factor."""
    shape = (config["encoder_hidden_size"], grid, grid)
    mean, std = (tensors[name].double() for name in ("_latents_mean", "_latents_std"))
    if {mean.numel(), std.numel()} - {1, shape[0] * grid * grid}:
        raise UserError(f"{source}: latent statistics of shape {tuple(mean.shape)}, {tuple(std.shape)}", f"{shape}")
    var = ((std + STD_OFFSET) / config.get("scaling_factor", 1.0)).square() - VAR_EPS
    if (var < 0).any():
        raise UserError(f"{source}: latents_std down to {std.min().item():.2g}", "above 0.0032 = sqrt(1e-5)")
    return tuple(value.expand(shape).float().contiguous() for value in (mean, var))  # type: ignore[return-value]


def _write_encoder(folder: Path, family: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The frozen encoder as a folder of transformers."""
    prefix = "encoder."
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    # The final norm has no affine map in an RAE; the file needs one, which loading leaves out again.
    norm = "post_layernorm" if family == "siglip_vision_model" else "layernorm"
    place = "vision_model." if any(name.startswith("vision_model.") for name in found) else ""
    width = config["encoder_hidden_size"]
    found[f"{place}{norm}.weight"], found[f"{place}{norm}.bias"] = torch.ones(width), torch.zeros(width)
    folder.mkdir(parents=True, exist_ok=True)
    _encoder_config(family, config).save_pretrained(folder)
    save_safetensors(folder / "model.safetensors", {n: v.contiguous() for n, v in found.items()}, {"format": "pt"})
    statistics = {f"image_{name}": tensors[f"encoder_{name}"].flatten().tolist() for name in ("mean", "std")}
    write_json(folder / "preprocessor_config.json", {"do_normalize": True, "do_rescale": True, **statistics})


def _encoder_config(family: str, config: Mapping[str, Any]) -> Any:
    """transformers' configuration with the sizes that diffusers builds this family from."""
    from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig, ViTMAEConfig

    sizes = {
        "hidden_size": config["encoder_hidden_size"],
        "patch_size": config["encoder_patch_size"],
        "num_hidden_layers": config["encoder_num_hidden_layers"],
        "num_attention_heads": config["encoder_hidden_size"] // 64,
    }
    if family == "dinov2_with_registers":
        return Dinov2WithRegistersConfig(**sizes, image_size=518)
    if family == "vit_mae":
        return ViTMAEConfig(**sizes, image_size=224, mask_ratio=0.0)
    return SiglipVisionConfig(**sizes, image_size=256)


def decoder_json(config: DecoderConfig) -> dict[str, Any]:
    """The decoder's configuration as the reference reads it, with `AutoConfig`."""
    content = {name: value for name, value in asdict(config).items() if name != "grid"}
    size = config.patch_size * config.grid
    return {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "image_size": size, **content}


def _write_section(folder: Path, family: str, config: Mapping[str, Any], decoder: DecoderConfig) -> Path:
    _, encoder_cls, place = FAMILIES[family]
    params = {
        "encoder_cls": encoder_cls,
        "encoder_config_path": str(folder / "encoder"),
        "encoder_input_size": config["encoder_input_size"],
        "encoder_params": {place: str(folder / "encoder")},
        "decoder_config_path": str(folder / "decoder"),
        "decoder_patch_size": decoder.patch_size,
        "pretrained_decoder_path": str(folder / "decoder" / "model.pt"),
        "noise_tau": config.get("noise_tau", 0.0),
        "normalization_stat_path": str(folder / "stat.pt"),
    }
    path = folder / "stage_1.yaml"
    with atomic_write(path, "w") as file:
        # JSON is YAML.
        json.dump({"stage_1": {"target": "stage1.RAE", "params": params}}, file, indent=2)
        file.write("\n")
    return path
