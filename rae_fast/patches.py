"""Square grids of patches: their position table, and the way from patch values back to images.

Shapes: B samples, C channels, H and W sides, N = grid x grid tokens in row-major order, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SINCOS_BASE = 10_000.0


def sincos_table(width: int, grid: int, spacing: float = 1.0) -> Tensor:
    """Fixed sine-cosine positions [1, grid * grid, width], float32, computed in float64.

    The first half of the channels encodes the column, the second the row; each is [sin, cos] of
    pos / 10000^(4k / width), as in MAE (arXiv 2111.06377), with pos = 0, spacing, 2 spacing, ...
    """
    omega = SINCOS_BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = spacing * torch.arange(grid, dtype=torch.float64)[:, None] * omega[None, :]
    one_axis = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    column = one_axis[None, :, :].expand(grid, -1, -1)
    row = one_axis[:, None, :].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, width).float()


def unpatchify(x_BNE: Tensor, patch_size: int, grid: int) -> Tensor:
    """[B, N, p p C] -> [B, C, H, W], a patch's values being ordered row, column, channel."""
    x = x_BNE.unflatten(1, (grid, grid)).unflatten(-1, (patch_size, patch_size, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def embed_patches(x_BCHW: Tensor, weight_DCPP: Tensor, bias_D: Tensor | None) -> Tensor:
    """The convolution whose patches tile the image, as one matrix product: [B, C, H, W] -> [B, N, D].

    The sides must be multiples of the kernel's; the gradient with respect to the image is far cheaper than a strided
    convolution's on a CPU.
    """
    height, width = weight_DCPP.shape[2:]
    x = x_BCHW.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # B C rows P columns P
    patches_BNE = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(patches_BNE, weight_DCPP.flatten(1), bias_D)
