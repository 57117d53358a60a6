"""Any vision transformer of timm, DINOv3's among them, by name and with hub or local weights.

Shapes: B images, S pixels a side, N tokens, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.encoders.base import EncoderFacts, EncoderOptions, FrozenEncoder
from rae_fast.errors import UserError, nearest
from rae_fast.provenance import sha256_file, sha256_tensors

REASON_LENGTH = 200  # characters of another library's message
VIT_ATTRIBUTES = ("forward_intermediates", "norm", "num_prefix_tokens", "blocks")


class TimmViT(FrozenEncoder):
    """A timm model with tokens: `forward_intermediates`, a final `norm`, and a square patch."""

    @classmethod
    def load(cls, options: EncoderOptions, input_size: int, config_path: str | None) -> TimmViT:
        """Load by timm name, with `encoder_params.weights` as a local file or timm's own weights from the hub.

        Args:
            options: `encoder_params`.
            input_size: side that images are resized to, S pixels; positions are interpolated to it once, here.
            config_path: unused; timm's own configuration gives mean and std.

        Raises:
            UserError: timm has no such model, it has no patch tokens, or its weights are not to be had.
        """
        model = _create(options, pretrained=True, img_size=input_size)
        facts = _facts(model, options)
        final_norm, model.norm = model.norm, nn.Identity()
        digest = sha256_file(options.weights) if options.weights else sha256_tensors(model.state_dict())
        return cls(
            model,
            facts,
            final_norm=final_norm,
            prefix_tokens=_count_prefix_tokens(model),
            num_layers=len(model.blocks),
            input_size=input_size,
            options=options,
            revision=options.revision,
            weights_sha256=digest,
        )

    def block_tokens(self, pixels_B3SS: Tensor) -> Sequence[Tensor]:
        """Outputs [B, prefix + N, C] of the wanted blocks."""
        pairs = self.model.forward_intermediates(
            pixels_B3SS,
            indices=list(self.layers),
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            # Some models lack this argument, and some stop on it where there are no such tokens.
            **({"return_prefix_tokens": True} if self.prefix_tokens else {}),
        )
        return [_join(pair) for pair in pairs]


def _count_prefix_tokens(model: Any) -> int:
    """Class and register tokens that go through the blocks; XCiT's and CaiT's class token only comes behind them."""
    arguments = inspect.signature(model.forward_intermediates).parameters
    return model.num_prefix_tokens if "return_prefix_tokens" in arguments else 0


def timm_facts(options: EncoderOptions) -> EncoderFacts:
    """Sizes and image statistics of a timm model, without weights.

    Raises:
        UserError: timm has no such model, or it has no patch tokens.
    """
    return _facts(_create(options, pretrained=False), options)


def _facts(model: Any, options: EncoderOptions) -> EncoderFacts:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None or not all(hasattr(model, name) for name in VIT_ATTRIBUTES):
        raise UserError(f"timm model {options.name} has no patch tokens", "a vision transformer")
    sides = {patch} if isinstance(patch, int) else set(patch)
    if len(sides) > 1:
        raise UserError(f"timm model {options.name} has patches of {patch} pixels", "square patches")
    return EncoderFacts(
        model.embed_dim,
        sides.pop(),
        options.image_mean or tuple(model.pretrained_cfg["mean"]),
        options.image_std or tuple(model.pretrained_cfg["std"]),
    )


def _join(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """timm gives (patch tokens, prefix tokens), or the patch tokens alone where there is no prefix."""
    return output if isinstance(output, Tensor) else torch.cat([output[1], output[0]], dim=1)


def _create(options: EncoderOptions, *, pretrained: bool, **sizes: int) -> Any:
    import timm

    if options.weights is not None and not Path(options.weights).is_file():
        raise UserError(
            f"stage_1.params.encoder_params.weights is {options.weights}, which does not exist", "a file of weights"
        )
    if not options.name.startswith("hf-hub:") and not timm.is_model(options.name):
        raise UserError(
            f"timm has no model {options.name!r}{nearest(options.name, timm.list_models())}",
            "a name from timm.list_models()",
        )
    overlay = {"file": options.weights} if options.weights else None
    try:
        return timm.create_model(
            options.name, pretrained=pretrained, pretrained_cfg_overlay=overlay, num_classes=0, **sizes
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__
        raise UserError(
            f"timm model {options.name} cannot be loaded: {reason}",
            "its weights on this machine or on a hub within reach",
            "set stage_1.params.encoder_params.weights to a local file",
        ) from error
