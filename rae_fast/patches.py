"""Square grids of patches: their position table, and the way from patch values back to images.

Shapes: B samples, C channels, H and W sides, N = grid x grid tokens in row-major order, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

SINCOS_BASE = 10_000.0


def sincos_table(width: int, grid: int) -> Tensor:
    """Fixed sine-cosine positions [1, grid * grid, width], float32, computed in float64.

    The first half of the channels encodes the column, the second the row; each is [sin, cos] of
    pos / 10000^(4k / width), as in MAE (arXiv 2111.06377).
    """
    omega = SINCOS_BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega[None, :]
    one_axis = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    column = one_axis[None, :, :].expand(grid, -1, -1)
    row = one_axis[:, None, :].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, width).float()


def unpatchify(x_BNE: Tensor, patch_size: int, grid: int) -> Tensor:
    """[B, N, p p C] -> [B, C, H, W], a patch's values being ordered row, column, channel."""
    x = x_BNE.unflatten(1, (grid, grid)).unflatten(-1, (patch_size, patch_size, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
