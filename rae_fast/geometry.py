"""Sizes that follow from the encoder, and the check that no section of the config contradicts another.

Runs on the config alone, before any weight is loaded and before any memory is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod, sqrt
from pathlib import Path
from typing import Any

from rae_fast.config import DIT_PARAMS, Config, Stage1Params
from rae_fast.errors import UserError

WIDTHS = {"small": 384, "base": 768, "large": 1024, "huge": 1280, "so400m": 1152}
GIANT = 1536  # of DINOv2 and SigLIP 2; other families have giants of other widths
DINOV3_WIDTHS = {"s": 384, "b": 768, "l": 1024, "h": 1280, "7b": 4096}
PATCHES = {"Dinov2withNorm": 14, "DINOv2": 14, "MAEwNorm": 16, "MAE": 16, "DINOv3": 16}
PATH_KEYS = ("dinov2_path", "model_name", "path")
# Arguments of a diffusion transformer by kind; what is in neither is a whole number.
FLAGS = (*(name for name in DIT_PARAMS if name.startswith("use_")), "learn_sigma", "wo_shift")
PAIRS = ("patch_size", "hidden_size", "depth", "num_heads")  # of DiTDH: trunk and head


@dataclass(frozen=True)
class Geometry:
    """Sizes shared by all stages.

    Attributes:
        latent_shape: [C, H, W] of one latent.
        image_size: side of the images, pixels.
        num_classes: number of classes, or None if neither config nor model says.
        null_label: label of the unconditional branch.
        shift: time shift sqrt(dim / base) of training and sampling (paper section 4.2).
    """

    latent_shape: tuple[int, int, int]
    image_size: int
    num_classes: int | None
    null_label: int | None
    shift: float

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.latent_shape[1]


def resolve_geometry(config: Config) -> Geometry:
    """Derive every size from the encoder where it can be known offline, else from `misc` and the models' sections.

    Raises:
        UserError: two keys contradict each other (both are named), a value is of the wrong kind or range, or too
            little is given to know the latent's size.
    """
    _check_sizes(config)
    latent_shape, origin = _latent_shape(config)
    _check_misc_latent(config, latent_shape, origin)
    _check_dit(config.stage_2.target, config.stage_2.params, "stage_2.params", latent_shape, origin)
    if config.guidance.guidance_model is not None:
        model = config.guidance.guidance_model
        _check_dit(model.target, model.params, "guidance.guidance_model.params", latent_shape, origin)
    image_size = _image_size(config, latent_shape)
    num_classes = _num_classes(config)
    null_label = config.misc.null_label if config.misc.null_label is not None else num_classes
    if null_label is not None and num_classes is not None and not 0 <= null_label <= num_classes:
        raise UserError(
            f"misc.null_label is {null_label}, but misc.num_classes is {num_classes}",
            f"misc.null_label {num_classes}, the row behind the last class",
        )
    dim = config.misc.time_dist_shift_dim or prod(latent_shape)
    return Geometry(latent_shape, image_size, num_classes, null_label, sqrt(dim / config.misc.time_dist_shift_base))


def _check_sizes(config: Config) -> None:
    """Refuse sizes below 1, and tokens instead of a grid, which the official files never ask for."""
    params, misc = config.stage_1.params, config.misc
    for key, value in (
        ("stage_1.params.encoder_input_size", params.encoder_input_size),
        ("stage_1.params.decoder_patch_size", params.decoder_patch_size),
        ("misc.num_classes", misc.num_classes),
        ("misc.time_dist_shift_dim", misc.time_dist_shift_dim),
        ("misc.time_dist_shift_base", misc.time_dist_shift_base),
    ):
        if value is not None and value < 1:
            raise UserError(f"{key} is {value}", "a positive number")
    if not params.reshape_to_2d:
        raise UserError("stage_1.params.reshape_to_2d is false", "true: latents are [C, H, W]", "leave it out")


def encoder_facts(params: Stage1Params) -> tuple[int | None, int | None]:
    """(patch size, width) of the encoder, from its local config.json or its published name; None where unknown."""
    name = next((str(params.encoder_params[key]) for key in PATH_KEYS if params.encoder_params.get(key)), "")
    config_file = Path(name) / "config.json"
    if name and config_file.is_file():
        try:
            facts = json.loads(config_file.read_text())
        except ValueError as error:
            raise UserError(f"{config_file} is not JSON: {error}", "the encoder's config.json") from error
        facts = facts.get("vision_config", facts) if isinstance(facts, dict) else None
        if not isinstance(facts, dict):
            raise UserError(f"{config_file} holds no mapping", "the encoder's config.json")
        return _number(facts.get("patch_size")), _number(facts.get("hidden_size"))
    return _published_facts(name.rsplit("/", 1)[-1].lower(), params.encoder_cls)


def _published_facts(name: str, encoder_cls: str) -> tuple[int | None, int | None]:
    """(patch size, width) that a model's published name tells, without its owner's."""
    if dinov3 := re.match(r"dinov3-vit(7b|[sblh])(\d+)", name):
        return int(dinov3.group(2)), DINOV3_WIDTHS[dinov3.group(1)]
    named_patch = re.search(r"patch_?(\d+)", name)
    if named_patch:
        patch: int | None = int(named_patch.group(1))
    else:
        patch = 14 if name == "vit-mae-huge" else PATCHES.get(encoder_cls)
    words = re.split(r"[-_]", name)
    width = next((size for word, size in WIDTHS.items() if word in words), None)
    if "giant" in words and re.search("dinov2|siglip2", name):
        width = GIANT
    return patch, width


def _latent_shape(config: Config) -> tuple[tuple[int, int, int], str]:
    """The latent's size and a phrase that says where it comes from."""
    params = config.stage_1.params
    patch, width = encoder_facts(params)
    given = config.misc.latent_size
    if patch is not None and params.encoder_input_size % patch:
        raise UserError(
            f"stage_1.params.encoder_input_size is {params.encoder_input_size}",
            f"a multiple of the encoder's patch size {patch}",
        )
    if patch is not None:
        grid = params.encoder_input_size // patch
        channels = width or (given[0] if given else config.stage_2.params.get("in_channels"))
        origin = f"stage_1.params.encoder_input_size {params.encoder_input_size} / patch {patch} = {grid}x{grid} tokens"
        if channels:
            return (int(channels), grid, grid), origin
    if given and len(given) == 3:
        return (given[0], given[1], given[2]), f"misc.latent_size {given}"
    raise UserError(
        f"the size of the latents is unknown for encoder {params.encoder_cls} {dict(params.encoder_params)}",
        "misc.latent_size: [C, H, W]",
        "add it to the config",
    )


def _check_misc_latent(config: Config, latent_shape: tuple[int, int, int], origin: str) -> None:
    given = config.misc.latent_size
    if given is not None and tuple(given) != latent_shape:
        raise UserError(
            f"misc.latent_size is {list(given)}, but {origin} and width {latent_shape[0]}",
            f"misc.latent_size {list(latent_shape)}",
            "change one of the two",
        )


def _check_dit(
    target: str, params: Mapping[str, Any], key: str, latent_shape: tuple[int, int, int], origin: str
) -> None:
    channels, grid, _ = latent_shape
    for name, value in params.items():
        expected = _unfit(name, value)
        if expected:
            raise UserError(f"{key}.{name} is {value!r}", expected)
    if "in_channels" in params and params["in_channels"] != channels:
        raise UserError(
            f"{key}.in_channels is {params['in_channels']}, but the latents have {channels} channels ({origin})",
            f"{key}.in_channels {channels}",
        )
    if "input_size" in params and params["input_size"] != grid:
        raise UserError(
            f"{key}.input_size is {params['input_size']}, but {origin}",
            f"{key}.input_size {grid} (or an encoder_input_size to match)",
        )
    for width, heads in zip(_as_list(params.get("hidden_size")), _as_list(params.get("num_heads")), strict=False):
        if width % heads or (params.get("use_rope", True) and (width // heads) % 4):
            raise UserError(
                f"{key}: hidden_size {width} with num_heads {heads} ({target})",
                "a head dimension that is whole and, for 2-D RoPE, divisible by 4",
            )


def _unfit(name: str, value: Any) -> str:
    """What an argument of a diffusion transformer should have been; empty if it can be."""
    if name in FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if name in ("mlp_ratio", "class_dropout_prob"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "mlp_ratio":
            return "" if number and 0 < value < inf else "a number above 0"
        return "" if number and 0 <= value <= 1 else "a probability"
    values = value if name in PAIRS and isinstance(value, list | tuple) else [value]
    if all(isinstance(entry, int) and not isinstance(entry, bool) and entry > 0 for entry in values):
        return ""
    return "a whole number above 0" + (", or one for the trunk and one for the head" if name in PAIRS else "")


def _image_size(config: Config, latent_shape: tuple[int, int, int]) -> int:
    derived = config.stage_1.params.decoder_patch_size * latent_shape[1]
    if config.data.image_size is not None and config.data.image_size != derived:
        raise UserError(
            f"data.image_size is {config.data.image_size}, but stage_1.params.decoder_patch_size "
            f"{config.stage_1.params.decoder_patch_size} x {latent_shape[1]} tokens makes {derived}",
            f"data.image_size {derived}",
            "change data.image_size, decoder_patch_size or encoder_input_size",
        )
    return derived


def _num_classes(config: Config) -> int | None:
    ours, model = config.misc.num_classes, config.stage_2.params.get("num_classes")
    if ours is not None and model is not None and ours != model:
        raise UserError(
            f"misc.num_classes is {ours}, but stage_2.params.num_classes is {model}", "the same number in both"
        )
    return ours if ours is not None else model


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(value: Any) -> int | None:
    """Decoder and encoder configs in the wild write sizes as numbers or as strings."""
    if isinstance(value, list) and value:
        value = value[0]
    return int(value) if isinstance(value, int | str) and str(value).isdigit() else None


def dit_params(config: Config, geometry: Geometry) -> dict[str, Any]:
    """`stage_2.params` with the sizes that follow from the encoder and the data filled in where the file omits them."""
    derived: dict[str, Any] = {"input_size": geometry.grid, "in_channels": geometry.latent_shape[0]}
    if geometry.num_classes is not None:
        derived["num_classes"] = geometry.num_classes
    return {**derived, **config.stage_2.params}
