"""Sizes that follow from the encoder, and the check that no section of the config contradicts another.

Runs on the config alone, before any weight is loaded and before any memory is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

from rae_fast.config import Config, Stage1Params
from rae_fast.errors import UserError

WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
PATCHES = {"Dinov2withNorm": 14, "MAEwNorm": 16}
PATH_KEYS = ("dinov2_path", "model_name", "path")


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
        UserError: two keys contradict each other (both are named), or too little is given to know the latent's size.
    """
    latent_shape, origin = _latent_shape(config)
    _check_misc_latent(config, latent_shape, origin)
    _check_dit(config.stage_2.target, config.stage_2.params, "stage_2.params", latent_shape, origin)
    if config.guidance.guidance_model is not None:
        model = config.guidance.guidance_model
        _check_dit(model.target, model.params, "guidance.guidance_model.params", latent_shape, origin)
    image_size = _image_size(config, latent_shape)
    num_classes = _num_classes(config)
    null_label = config.misc.null_label if config.misc.null_label is not None else num_classes
    dim = config.misc.time_dist_shift_dim or prod(latent_shape)
    if config.misc.time_dist_shift_base <= 0:
        raise UserError(f"misc.time_dist_shift_base is {config.misc.time_dist_shift_base}", "a positive number")
    return Geometry(latent_shape, image_size, num_classes, null_label, sqrt(dim / config.misc.time_dist_shift_base))


def encoder_facts(params: Stage1Params) -> tuple[int | None, int | None]:
    """(patch size, width) of the encoder, from its local config.json or its published name; None where unknown."""
    name = next((str(params.encoder_params[key]) for key in PATH_KEYS if params.encoder_params.get(key)), "")
    config_file = Path(name) / "config.json"
    if name and config_file.is_file():
        try:
            facts = json.loads(config_file.read_text())
        except ValueError as error:
            raise UserError(f"{config_file} is not JSON: {error}", "the encoder's config.json") from error
        facts = facts.get("vision_config", facts)
        return _number(facts.get("patch_size")), _number(facts.get("hidden_size"))
    named_patch = re.search(r"patch_?(\d+)", name)
    patch = int(named_patch.group(1)) if named_patch else PATCHES.get(params.encoder_cls)
    width = next((size for word, size in WIDTHS.items() if word in name), None)
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
