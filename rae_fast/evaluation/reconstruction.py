"""How close reconstructions are to their originals.

Shapes: N images [N, 3, H, W], uint8 or floats in [0, 1]; results float64 or float32 [N], one value per image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae_fast.errors import UserError

# Identical images: 100 dB, as in the reference.
MSE_FLOOR = 1e-10
CHUNK = 64


def psnr(restored: Tensor, original: Tensor) -> Tensor:
    """-10 log10(max(mse, 1e-10)) in dB, float64 [N].

    Raises:
        UserError: different shapes.
    """
    _check(restored, original)
    values = [
        (_unit(a).double() - _unit(b).double()).square().flatten(1).mean(1)
        for a, b in zip(restored.split(CHUNK), original.split(CHUNK), strict=True)
    ]
    return -10 * torch.log10(torch.cat(values).clamp(min=MSE_FLOOR))


def ssim(restored: Tensor, original: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) with torchmetrics' defaults and range 1, float32 [N].

    Raises:
        UserError: different shapes.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(restored, original)
    values = [
        structural_similarity_index_measure(_unit(a), _unit(b), data_range=1.0, reduction="none").reshape(-1)
        for a, b in zip(restored.split(CHUNK), original.split(CHUNK), strict=True)
    ]
    return torch.cat(values)


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _check(restored: Tensor, original: Tensor) -> None:
    if restored.shape != original.shape or not len(restored):
        raise UserError(
            f"images of shapes {tuple(restored.shape)} and {tuple(original.shape)}",
            "pairs of the same size",
            "check that both sets were cropped alike and are complete",
        )
