"""Frozen encoders by name, and what is known of one before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rae_fast.config import Stage1Params
from rae_fast.encoders.base import EncoderFacts, EncoderOptions, FrozenEncoder
from rae_fast.encoders.dinov2 import Dino
from rae_fast.encoders.files import CONFIG, PREPROCESSOR, cached_folder, image_statistics
from rae_fast.encoders.mae import MAE
from rae_fast.encoders.siglip2 import SigLIP
from rae_fast.encoders.timm_vit import TimmViT, timm_facts
from rae_fast.errors import UserError, nearest
from rae_fast.geometry import encoder_facts as published_sizes
from rae_fast.provenance import read_json

ENCODERS: dict[str, type[Dino] | type[MAE] | type[SigLIP] | type[TimmViT]] = {
    "Dinov2withNorm": Dino,
    "MAEwNorm": MAE,
    "SigLIP2wNorm": SigLIP,
    "DINOv2": Dino,
    "DINOv3": Dino,
    "MAE": MAE,
    "SigLIP2": SigLIP,
    "TimmViT": TimmViT,
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTERED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def build_encoder(
    encoder_cls: str, *, input_size: int, params: Mapping[str, Any], config_path: str | None = None
) -> FrozenEncoder:
    """A frozen encoder with its weights.

    Args:
        encoder_cls: a name of the reference (Dinov2withNorm, MAEwNorm, SigLIP2wNorm) or of ours.
        input_size: side that images are resized to, pixels.
        params: `stage_1.params.encoder_params`, see `EncoderOptions`.
        config_path: folder or hub id whose image processor gives mean and std; None: the encoder's own.

    Raises:
        UserError: unknown name or option, weights that are missing or do not fit, an input size that does not fit.
    """
    return _encoder_class(encoder_cls).load(EncoderOptions.from_params(params), input_size, config_path)


def _encoder_class(encoder_cls: str) -> type[Dino] | type[MAE] | type[SigLIP] | type[TimmViT]:
    if encoder_cls not in ENCODERS:
        raise UserError(
            f"stage_1.params.encoder_cls is {encoder_cls!r}{nearest(encoder_cls, ENCODERS)}",
            f"one of {', '.join(ENCODERS)}",
        )
    return ENCODERS[encoder_cls]


def encoder_facts(encoder_cls: str, *, params: Mapping[str, Any], config_path: str | None = None) -> EncoderFacts:
    """Sizes and image statistics of an encoder without its weights and without a network.

    They come from the files on this machine where there are any, else from the model's published name. This is what
    decoding needs, so that a machine that only samples needs no encoder.

    Raises:
        UserError: unknown name, or nothing here and a name that does not tell the sizes.
    """
    family, options = _encoder_class(encoder_cls), EncoderOptions.from_params(params)
    if family is TimmViT:
        return timm_facts(options)
    patch, width = published_sizes(Stage1Params(encoder_cls=encoder_cls, encoder_params=dict(params)))
    folder = cached_folder(options.name, options.revision)
    if folder is not None:
        config = read_json(folder / CONFIG)
        config = config.get("vision_config", config)
        patch, width = config.get("patch_size", patch), config.get("hidden_size", width)
    if patch is None or width is None:
        raise UserError(
            f"the sizes of encoder {options.name} are unknown: it is not on this machine",
            f"a folder with {CONFIG}, or a published name such as facebook/dinov2-with-registers-base",
        )
    places = [config_path and cached_folder(config_path, None), folder]
    folders = [place for place in places if place and (place / PREPROCESSOR).is_file()]
    statistics = CENTERED if family is SigLIP else IMAGENET
    if folders or options.image_mean:
        statistics = image_statistics(options, folders)
    return EncoderFacts(int(width), patch if isinstance(patch, int) else int(patch[0]), *statistics)
