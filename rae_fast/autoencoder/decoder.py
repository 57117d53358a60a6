"""ViT decoder of latents to pixels, in the style of MAE's, under the reference's state-dict names.

Shapes: B samples, C latent channels, N tokens, D decoder width, P pixels a patch side, H and W image sides.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae_fast.errors import UserError
from rae_fast.patches import sincos_table, unpatchify
from rae_fast.provenance import read_json
from rae_fast.shipped import shipped
from rae_fast.weights import load_strictly, read_weights_file, select_weights

# (width, layers, heads, feed-forward width) of the decoders that the reference trains.
SIZES = {"ViTB": (768, 12, 12, 3072), "ViTL": (1024, 24, 16, 4096), "ViTXL": (1152, 28, 16, 4096)}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, named as in Hugging Face's ViT-MAE configuration where that has them.

    Attributes:
        hidden_size: latent channels C.
        grid: tokens a side.
        patch_size: pixels a patch side P; the image is grid * patch_size pixels a side.
    """

    hidden_size: int = 768
    grid: int = 16
    patch_size: int = 16
    num_channels: int = 3
    decoder_hidden_size: int = 1152
    decoder_num_hidden_layers: int = 28
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 4096
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"decoder config: {field.name} is {value}", "a whole number above 0")
        if self.decoder_hidden_size % self.decoder_num_attention_heads or self.decoder_hidden_size % 4:
            raise UserError(
                f"decoder config: decoder_hidden_size {self.decoder_hidden_size} with "
                f"decoder_num_attention_heads {self.decoder_num_attention_heads}",
                "a width that the heads and the number 4 divide",
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"decoder config: hidden_act is {self.hidden_act!r}", f"one of {', '.join(sorted(ACTIVATIONS))}"
            )


def load_decoder_config(path: str | Path) -> DecoderConfig:
    """Read a decoder's `config.json` (the file, its folder, or the name of a size such as ViTXL).

    Latent channels, grid and patch size follow from the encoder; `dataclasses.replace` sets them. Numbers written as
    strings, as in the reference's files, are accepted.

    Raises:
        UserError: neither a file nor a known size, or an entry that is not a number.
    """
    path = shipped(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.name in SIZES:
            return named_decoder(path.name)
        raise UserError(
            f"stage_1.params.decoder_config_path is {path}, which does not exist",
            f"a config.json, its folder, or one of {', '.join(SIZES)}",
        )
    content = read_json(file)
    known: dict[str, Any] = {}
    for name, default in DecoderConfig.__dataclass_fields__.items():
        if name != "grid" and name in content:
            known[name] = _typed(content[name], type(default.default), f"{file}: {name}")
    missing = [name for name in ("decoder_hidden_size", "decoder_num_hidden_layers") if name not in known]
    if missing:
        raise UserError(f"{file} has no {missing[0]}", "the configuration of a ViT-MAE decoder")
    return DecoderConfig(**known)


def named_decoder(size: str) -> DecoderConfig:
    """The configuration of a size of `SIZES`."""
    width, layers, heads, intermediate = SIZES[size]
    return DecoderConfig(
        decoder_hidden_size=width,
        decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=intermediate,
    )


def _typed(value: Any, kind: type, where: str) -> Any:
    try:
        return kind(value) if kind is not bool else bool(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is {value!r}", f"a value of type {kind.__name__}") from error


class SelfAttention(nn.Module):
    """Multi-head attention with the module names of Hugging Face's ViT."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.num_heads = config.decoder_num_attention_heads
        self.attention = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=config.qkv_bias) for name in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = (self.attention[name](x_BND) for name in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.output["dense"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm transformer block: x <- x + attn(norm(x)); x <- x + W2 gelu(W1 norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.gelu = ACTIVATIONS[config.hidden_act]
        self.attention = SelfAttention(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.decoder_intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.decoder_intermediate_size, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x_BND = x_BND + self.attention(self.layernorm_before(x_BND))
        h = F.gelu(self.intermediate["dense"](self.layernorm_after(x_BND)), approximate=self.gelu)
        return x_BND + self.output["dense"](h)


class ViTDecoder(nn.Module):
    """Tokens to patches of pixels, with a class token and a position table that training may change.

    Attributes:
        activation_checkpointing: recompute each layer's activations in the backward pass instead of keeping them.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        width = config.decoder_hidden_size
        table = torch.cat([torch.zeros(1, 1, width), sincos_table(width, config.grid)], dim=1)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial against the reconstruction loss."""
        return self.decoder_pred.weight

    def forward(self, tokens_BNC: Tensor, *, drop_cls_token: bool = False) -> Tensor:
        """Patch values [B, grid * grid, P P 3] in row-major order.

        Args:
            tokens_BNC: un-normalized latents; another square grid than the decoder's is interpolated bilinearly.
            drop_cls_token: the first token is a class token of the encoder, to be left out.

        Raises:
            UserError: the tokens do not form a square, or have another width than the decoder's.
        """
        x_BND = self.decoder_embed(tokens_BNC.to(self.decoder_embed.weight.dtype))
        x_BND = self.resize_grid(x_BND[:, 1:] if drop_cls_token else x_BND)
        cls = self.trainable_cls_token.to(x_BND.dtype).expand(len(x_BND), -1, -1)
        x_BND = torch.cat([cls, x_BND], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BND = checkpoint(layer, x_BND, use_reentrant=False)
            else:
                x_BND = layer(x_BND)
        return self.decoder_pred(self.decoder_norm(x_BND))[:, 1:]

    def resize_grid(self, x_BND: Tensor) -> Tensor:
        """Tokens of another square grid, interpolated bilinearly to the decoder's.

        Raises:
            UserError: the tokens do not form a square.
        """
        grid, side = self.config.grid, isqrt(x_BND.shape[1])
        if side == grid and side * side == x_BND.shape[1]:
            return x_BND
        if side * side != x_BND.shape[1]:
            raise UserError(f"{x_BND.shape[1]} tokens for the decoder", "a square number of tokens")
        x_BDHW = x_BND.transpose(1, 2).unflatten(2, (side, side))
        x_BDHW = F.interpolate(x_BDHW, size=(grid, grid), mode="bilinear", align_corners=False)
        return x_BDHW.flatten(2).transpose(1, 2)

    def unpatchify(self, patches_BNE: Tensor) -> Tensor:
        """Patch values [B, N, P P 3] to pixels [B, 3, H, W]."""
        return unpatchify(patches_BNE, self.config.patch_size, self.config.grid)


def read_decoder_weights(path: str | Path, which: str = "ema") -> dict[str, Tensor]:
    """The decoder's state dict in a bare file, the released form, or in a stage-1 training checkpoint.

    A checkpoint's encoder is passed over: it is frozen, and its names depend on the version of transformers.

    Raises:
        UserError: the file cannot be read or holds no decoder.
    """
    tensors = select_weights(read_weights_file(path), path, which)
    prefix = "decoder."
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return inside or tensors


def load_decoder_weights(decoder: ViTDecoder, path: str | Path) -> None:
    """Load a decoder from a bare state dict or a stage-1 training checkpoint.

    Raises:
        UserError: the file cannot be read, or its names or shapes are not the decoder's; the decoder is left as it was.
    """
    load_strictly(
        decoder,
        read_decoder_weights(path),
        path,
        "check stage_1.params.decoder_config_path, decoder_patch_size and encoder_input_size",
    )
