"""The discriminator: trained heads on the activations of a frozen DINO ViT (StyleGAN-T, Sauer et al., ICML 2023).

State-dict names are the reference's: `DiscriminatorHeads` saves as `heads.<i>.<block>...` with `weight_orig`,
`weight_u` and `weight_v`; `DinoBackbone` loads DINO's released files.

Shapes: B images, C channels, L patch tokens, N = L + 1 tokens with the class token, D head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_fast.autoencoder.losses import at_least_float32
from rae_fast.config import DiscriminatorArch
from rae_fast.errors import UserError, nearest
from rae_fast.patches import embed_patches
from rae_fast.runtime import ranks_from_environment
from rae_fast.weights import read_weights_file, select_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NEGATIVE_SLOPE = 0.2
GROUPS = 32  # of the GroupNorm variant


@dataclass(frozen=True)
class DinoRecipe:
    """Sizes of the frozen ViT."""

    depth: int = 12
    embed_dim: int = 384
    num_heads: int = 6
    patch_size: int = 8
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    image_size: int = 224  # images are resized to this side first, pixels


RECIPES = {
    "S_8": (DinoRecipe(), "vit_small_patch8_224.dino"),
    "S_16": (DinoRecipe(patch_size=16), "vit_small_patch16_224.dino"),
    "B_16": (DinoRecipe(embed_dim=768, num_heads=12, patch_size=16), "vit_base_patch16_224.dino"),
}


# --- the frozen backbone --------------------------------------------------------------------------------------------


class DinoBackbone(nn.Module):
    """A ViT without its final norm; gives the patch tokens after the last block and after each key depth."""

    def __init__(self, recipe: DinoRecipe, key_depths: Sequence[int]) -> None:
        super().__init__()
        self.recipe = recipe
        self.key_depths = tuple(sorted(depth for depth in key_depths if depth < recipe.depth))
        width = recipe.embed_dim
        grid = recipe.image_size // recipe.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, recipe.patch_size, recipe.patch_size)})
        self.blocks = nn.ModuleList(_Block(recipe) for _ in range(recipe.depth))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x_B3HW: Tensor) -> list[Tensor]:
        """Images in [-1, 1] -> activations [B, C, L]: the last block's, then those of the key depths, ascending."""
        side = self.recipe.image_size
        if x_B3HW.shape[-2:] != (side, side):
            x_B3HW = F.interpolate(x_B3HW, size=(side, side), mode="bilinear", align_corners=False)
        x_B3HW = ((x_B3HW + 1) / 2 - self.mean) / self.std
        proj = self.patch_embed["proj"]
        x_BLC = embed_patches(x_B3HW, proj.weight, proj.bias)
        x_BNC = torch.cat([self.cls_token.expand(len(x_BLC), -1, -1), x_BLC], dim=1) + self.pos_embed
        activations = []
        for depth, block in enumerate(self.blocks):
            x_BNC = block(x_BNC)
            if depth in self.key_depths:
                activations.append(x_BNC[:, 1:].transpose(1, 2))
        return [x_BNC[:, 1:].transpose(1, 2), *activations]


class _Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, recipe: DinoRecipe) -> None:
        super().__init__()
        width, hidden = recipe.embed_dim, int(recipe.embed_dim * recipe.mlp_ratio)
        self.num_heads = recipe.num_heads
        self.norm1 = nn.LayerNorm(width, eps=recipe.norm_eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=recipe.norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x_BNC: Tensor) -> Tensor:
        count, tokens, width = x_BNC.shape
        qkv = self.attn["qkv"](self.norm1(x_BNC)).reshape(count, tokens, 3, self.num_heads, width // self.num_heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x_BNC = x_BNC + self.attn["proj"](mixed.transpose(1, 2).reshape(count, tokens, width))
        return x_BNC + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x_BNC)), approximate="tanh"))


def build_backbone(arch: DiscriminatorArch, *, seed: int = 0) -> DinoBackbone:
    """The frozen ViT of `gan.disc.arch`: from a file, else from timm for a named recipe, else seeded random.

    Raises:
        UserError: the recipe or a key in it is unknown, the weights cannot be found, or they have other sizes.
    """
    recipe, timm_name = _recipe(arch.recipe)
    backbone = DinoBackbone(recipe, arch.key_depths)
    if arch.dino_ckpt_path:
        load_backbone_weights(backbone, _read_weights(Path(arch.dino_ckpt_path)), arch.dino_ckpt_path)
    elif timm_name:
        load_backbone_weights(backbone, _timm_weights(timm_name), f"timm's {timm_name}")
    else:
        _randomize(backbone, seed)
        if ranks_from_environment().is_main:
            print(f"discriminator: seeded random ViT, no pretrained weights ({recipe})")
    return backbone


def _recipe(given: Any) -> tuple[DinoRecipe, str | None]:
    """The sizes, and timm's name of the weights for a named recipe."""
    if isinstance(given, str):
        if given not in RECIPES:
            raise UserError(f"gan.disc.arch.recipe is {given!r}", f"{', '.join(RECIPES)}, or a mapping of sizes")
        return RECIPES[given]
    known = [field.name for field in dataclasses.fields(DinoRecipe)]
    for name in given:
        if name not in known:
            raise UserError(
                f"gan.disc.arch.recipe: unknown key {name}{nearest(str(name), known)}", f"one of {', '.join(known)}"
            )
    recipe = DinoRecipe(**given)
    if recipe.embed_dim % recipe.num_heads or recipe.image_size % recipe.patch_size:
        raise UserError(
            f"gan.disc.arch.recipe {dict(given)}",
            "embed_dim a multiple of num_heads, and image_size a multiple of patch_size",
        )
    return recipe, None


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"gan.disc.arch.dino_ckpt_path {path} does not exist",
            "a DINO ViT checkpoint",
            "fetch models/discs/dino_vit_small_patch8_224.pth from nyu-visionx/RAE-collections, or leave the key out "
            "to take timm's",
        )
    return select_weights(read_weights_file(path), path)


def _timm_weights(name: str) -> Mapping[str, Tensor]:
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:  # what the hub's client raises offline
        raise UserError(
            f"timm cannot fetch {name}: {str(error).splitlines()[0]}",
            "DINO weights for the discriminator",
            "set gan.disc.arch.dino_ckpt_path to a local file, or gan.disc.arch.recipe to a mapping of sizes for a "
            "random backbone",
        ) from error


def load_backbone_weights(backbone: DinoBackbone, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy the weights, with the key biases zeroed (softmax is blind to them, released files hold noise there)."""
    own = backbone.state_dict()
    missing = [name for name in own if name not in weights]
    if missing:
        raise UserError(
            f"{origin} lacks {missing[0]} and {len(missing) - 1} more of the discriminator's tensors",
            "a ViT with the sizes of gan.disc.arch.recipe",
        )
    wanted = {name: weights[name].to(torch.float32) for name in own}
    wanted["pos_embed"] = _resized_positions(wanted["pos_embed"], own["pos_embed"].shape[1])
    for name, tensor in wanted.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{origin}: {name} is {list(tensor.shape)}",
                f"{list(own[name].shape)} for the sizes of gan.disc.arch.recipe",
                "choose the recipe that fits the file",
            )
        if name.endswith("attn.qkv.bias"):
            width = backbone.recipe.embed_dim
            tensor = torch.cat([tensor[:width], torch.zeros(width), tensor[2 * width :]])
        own[name].copy_(tensor)


def _resized_positions(table_1NC: Tensor, tokens: int) -> Tensor:
    """The positional table for another square grid, bicubic; the class token's row stays."""
    old, new = round(sqrt(table_1NC.shape[1] - 1)), round(sqrt(tokens - 1))
    if old == new:
        return table_1NC
    grid = table_1NC[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table_1NC[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _randomize(backbone: DinoBackbone, seed: int) -> None:
    """Variance-preserving normal weights, so that a random ViT still passes on what it sees."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in backbone.named_parameters():
            if name in ("cls_token", "pos_embed"):
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
            elif tensor.ndim >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / sqrt(tensor[0].numel()))
            elif name.endswith("bias"):
                tensor.zero_()


# --- the trained heads ----------------------------------------------------------------------------------------------


class DiscriminatorHeads(nn.Module):
    """One head an activation; logits of all patch tokens and heads side by side.

    Args:
        count: number of activations.
        width: channels of each.
        kernel_size: of the residual convolution along the token axis.
        norm_type: `bn` (each sample and channel by itself: batch norm with a virtual batch of one) or `gn`.
        spectral_norm: whether convolutions are divided by their largest singular value.
        norm_eps: of the norms.
    """

    def __init__(
        self,
        count: int,
        width: int,
        *,
        kernel_size: int = 9,
        norm_type: str = "bn",
        spectral_norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()

        def block(kernel: int) -> nn.Sequential:
            norm = (
                nn.GroupNorm(GROUPS, width, norm_eps, affine=True) if norm_type == "gn" else SampleNorm(width, norm_eps)
            )
            return nn.Sequential(
                _conv(width, width, kernel, spectral_norm), norm, nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)
            )

        self.heads = nn.ModuleList(
            nn.Sequential(block(1), Residual(block(kernel_size)), _conv(width, 1, 1, spectral_norm))
            for _ in range(count)
        )

    def forward(self, activations: Sequence[Tensor], *more: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Activations [B, C, L] of each depth -> float32 logits [B, count * L]; in train mode one power iteration.

        Several sets of activations give a tuple: one call of an engine, with a power iteration for each set in turn.
        """
        if more:
            return tuple(self._logits(part) for part in (activations, *more))
        return self._logits(activations)

    def _logits(self, activations: Sequence[Tensor]) -> Tensor:
        pairs = zip(self.heads, activations, strict=True)
        return at_least_float32(torch.cat([head(at_least_float32(x_BCL)).flatten(1) for head, x_BCL in pairs], dim=1))


def build_heads(arch: DiscriminatorArch, backbone: DinoBackbone, *, seed: int = 0) -> DiscriminatorHeads:
    """Seeded fresh heads for a backbone.

    Raises:
        UserError: GroupNorm does not divide the backbone's width.
    """
    width = backbone.recipe.embed_dim
    if arch.norm_type == "gn" and width % GROUPS:
        raise UserError(f"gan.disc.arch.norm_type is gn with a backbone of width {width}", f"a multiple of {GROUPS}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiscriminatorHeads(
            1 + len(backbone.key_depths),
            width,
            kernel_size=arch.ks,
            norm_type=arch.norm_type,
            spectral_norm=arch.using_spec_norm,
            norm_eps=arch.norm_eps,
        )


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / sqrt(2)


class SampleNorm(nn.Module):
    """Normalizes each channel of each sample over its tokens, then scale and shift.

    This is the reference's batch norm with a virtual batch of one: nothing crosses samples, so that logits depend
    neither on the batch nor on the number of ranks.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x_BCL: Tensor) -> Tensor:
        normed = F.layer_norm(x_BCL, x_BCL.shape[-1:], eps=self.eps)
        return normed * self.weight[:, None] + self.bias[:, None]


class SpectralConv1d(nn.Module):
    """A circular convolution whose kernel is divided by its largest singular value (Miyato et al., ICLR 2018).

    sigma = u^T W v; in train mode v <- W^T u / |W^T u|, u <- W v / |W v| once before each use.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        plain = nn.Conv1d(inputs, outputs, kernel_size)
        self.padding = kernel_size // 2
        self.weight_orig = nn.Parameter(plain.weight.detach())
        self.bias = nn.Parameter(plain.bias.detach())
        self.register_buffer("weight_u", F.normalize(torch.randn(outputs), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(inputs * kernel_size), dim=0, eps=1e-12))

    def forward(self, x_BCL: Tensor) -> Tensor:
        return _circular_conv(x_BCL, self.weight_orig / self._sigma(), self.bias, self.padding)

    def _sigma(self) -> Tensor:
        """The largest singular value as far as the power iterations know it; in float32 under any autocast."""
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            matrix = self.weight_orig.flatten(1)
            if self.training:
                with torch.no_grad():
                    self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12))
                    self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12))
            # clones: the next forward overwrites the buffers while this one's backward still needs them
            return torch.dot(self.weight_u.clone(), matrix @ self.weight_v.clone())


def _conv(inputs: int, outputs: int, kernel_size: int, spectral_norm: bool) -> nn.Module:
    if spectral_norm:
        return SpectralConv1d(inputs, outputs, kernel_size)
    return nn.Conv1d(inputs, outputs, kernel_size, padding=kernel_size // 2, padding_mode="circular")


def _circular_conv(x_BCL: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    if padding:
        x_BCL = F.pad(x_BCL, (padding, padding), mode="circular")
    return F.conv1d(x_BCL, weight, bias)
