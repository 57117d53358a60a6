"""What all frozen encoders share: preparation of images, final normalization, identity.

Shapes: B images, S pixels a side, N patch tokens, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_fast.errors import UserError, nearest
from rae_fast.runtime import DTYPES

RESIZE_RULE = "bicubic, align_corners=False, no antialias"
NAME_KEYS = ("dinov2_path", "model_name", "path")


@dataclass(frozen=True)
class EncoderOptions:
    """`stage_1.params.encoder_params`, read and checked.

    Attributes:
        name: hub id or local folder (timm: a model name), given as dinov2_path, model_name or path.
        revision: commit, tag or branch on the hub.
        normalize: final layer norm without the affine map; False keeps the model's own weights in it.
        layers: 0-based blocks whose normalized tokens are averaged (RAEv2, arXiv 2605.18324); None: the last block.
        dtype: type of weights and activations; tokens are float32 in any case.
        compile: compile the model.
        attention: transformers' attention implementation.
        image_mean, image_std: per RGB channel, where the files of the model do not give them.
        weights: timm only: a local file of weights.
    """

    name: str
    revision: str | None = None
    normalize: bool = True
    layers: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    compile: bool = False
    attention: str = "sdpa"
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    weights: str | None = None

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> EncoderOptions:
        """Read the mapping of the YAML; `num_tokens` of official files has no meaning and is passed over.

        Raises:
            UserError: no model is named, a key is unknown, or a value is of the wrong kind.
        """
        key = "stage_1.params.encoder_params"
        options = {name: value for name, value in params.items() if name not in (*NAME_KEYS, "num_tokens")}
        names = [str(params[name]) for name in NAME_KEYS if params.get(name)]
        if len(names) != 1:
            raise UserError(f"{key} names {len(names)} models", f"one of {', '.join(NAME_KEYS)}")
        known = [field.name for field in fields(cls) if field.name != "name"]
        for name in options:
            if name not in known:
                raise UserError(f"{key}.{name} is unknown{nearest(name, known)}", f"some of {', '.join(known)}")
        if options.get("dtype") is not None and not isinstance(options["dtype"], torch.dtype):
            if options["dtype"] not in DTYPES:
                raise UserError(f"{key}.dtype is {options['dtype']!r}", f"one of {', '.join(DTYPES)}")
            options["dtype"] = DTYPES[options["dtype"]]
        for name in ("layers", "image_mean", "image_std"):
            if options.get(name) is not None:
                options[name] = tuple(options[name])
        return cls(names[0], **{name: value for name, value in options.items() if value is not None})


@dataclass(frozen=True)
class EncoderFacts:
    """What is known of an encoder without its weights.

    Attributes:
        hidden_size: channels C of a token.
        patch_size: pixels a patch side.
        image_mean, image_std: per RGB channel, of images in [0, 1].
    """

    hidden_size: int
    patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def grid(self, input_size: int) -> int:
        """Tokens a side for images of `input_size` pixels.

        Raises:
            UserError: the patch size does not divide it.
        """
        if input_size < 1 or input_size % self.patch_size:
            raise UserError(
                f"stage_1.params.encoder_input_size is {input_size}",
                f"a multiple of the encoder's patch size {self.patch_size}",
            )
        return input_size // self.patch_size


class FrozenEncoder(nn.Module):
    """A pretrained vision transformer that turns images in [0, 1] into patch tokens, and never changes.

    Subclasses load their model, take its final norm out, and return block outputs from `block_tokens`.

    Args:
        model: the transformer, without its final norm.
        facts: sizes and image statistics.
        final_norm: the norm that was taken out.
        prefix_tokens: class and register tokens in front of the patch tokens.
        num_layers: number of blocks.
        input_size: side that images are resized to, S pixels.
        options: `encoder_params`.
        revision: exact revision of the weights, where there is one.
        weights_sha256: hash of the weights.
    """

    model: nn.Module
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: nn.Module,
        facts: EncoderFacts,
        *,
        final_norm: nn.Module,
        prefix_tokens: int,
        num_layers: int,
        input_size: int,
        options: EncoderOptions,
        revision: str | None,
        weights_sha256: str,
    ) -> None:
        super().__init__()
        self.facts, self.grid = facts, facts.grid(input_size)
        self.hidden_size, self.patch_size, self.input_size = facts.hidden_size, facts.patch_size, input_size
        self.image_mean, self.image_std = facts.image_mean, facts.image_std
        self.prefix_tokens, self.num_layers, self.options = prefix_tokens, num_layers, options
        self.layers = check_layers(options.layers, num_layers)
        self._revision, self._weights_sha256 = revision, weights_sha256
        self.norm_eps = float(getattr(final_norm, "eps", 1e-6))
        self.final_norm = None if options.normalize else final_norm.float()
        self.model = model
        self.register_buffer("_mean", torch.tensor(facts.image_mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(facts.image_std).reshape(1, 3, 1, 1), persistent=False)
        self.model.to(options.dtype)
        self.requires_grad_(False).eval()
        if options.compile:
            self.model.compile()

    @abstractmethod
    def block_tokens(self, pixels_B3SS: Tensor) -> Sequence[Tensor]:
        """Outputs [B, prefix + N, C] of the blocks in `self.layers`, before the final norm."""

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Patch tokens [B, N, C] in float32.

        Args:
            images_B3HW: square images with values in [0, 1].

        Raises:
            UserError: the images are not square RGB images.
        """
        pixels_B3SS = self.prepare(images_B3HW).to(self.options.dtype)
        normed = [self.normalize(tokens[:, self.prefix_tokens :]) for tokens in self.block_tokens(pixels_B3SS)]
        return normed[0] if len(normed) == 1 else torch.stack(normed).mean(0)

    def prepare(self, images_B3HW: Tensor) -> Tensor:
        """Images resized to the encoder's input and standardized, float32 [B, 3, S, S].

        Raises:
            UserError: the images are not square RGB images.
        """
        channels, height, width = images_B3HW.shape[1:]
        if channels != 3 or height != width:
            raise UserError(
                f"images of {channels} channels, {height} x {width} pixels",
                "square RGB images",
                "crop them to squares first (data.image_size does)",
            )
        images_B3HW = images_B3HW.float()
        if height != self.input_size:
            size = (self.input_size, self.input_size)
            images_B3HW = F.interpolate(images_B3HW, size=size, mode="bicubic", align_corners=False)
        return (images_B3HW - self._mean) / self._std

    def normalize(self, tokens_BNC: Tensor) -> Tensor:
        """The final layer norm in float32, with or without the model's affine map."""
        if self.final_norm is not None:
            return self.final_norm(tokens_BNC.float())
        return F.layer_norm(tokens_BNC.float(), (self.hidden_size,), eps=self.norm_eps)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode: dropout or drop path of a frozen encoder would only be noise."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """What makes these tokens these: two encoders with equal identities give equal tokens."""
        return {
            "name": self.options.name,
            "revision": self._revision,
            "weights_sha256": self._weights_sha256,
            "layers": list(self.layers),
            "final_norm": "layernorm" if self.options.normalize else "layernorm_affine",
            "input_size": self.input_size,
            "resize": RESIZE_RULE,
        }


def check_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The blocks to average, or the last one.

    Raises:
        UserError: a number that is no block.
    """
    if layers is None:
        return (num_layers - 1,)
    wrong = [layer for layer in layers if not (isinstance(layer, int) and 0 <= layer < num_layers)]
    if wrong or not layers:
        raise UserError(
            f"stage_1.params.encoder_params.layers is {list(layers)}",
            f"whole numbers from 0 to {num_layers - 1} for an encoder of {num_layers} blocks",
        )
    return tuple(sorted(set(layers)))
