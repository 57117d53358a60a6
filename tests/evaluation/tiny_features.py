"""What `--features tests/evaluation/tiny_features:...` finds: extractors small enough for a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyNetwork(nn.Module):
    """Seeded random convolution: features [B, 6], spatial [B, 12], logits [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.patches, self.classes = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        maps = self.patches(images_B3HW).tanh()
        features = maps.mean((2, 3))
        return {"features": features, "spatial": maps[:, :3, :2, :2], "logits": 8 * self.classes(features)}


def colours(images_B3HW: Tensor) -> Tensor:
    """Mean and deviation of each channel."""
    return torch.cat([images_B3HW.mean((2, 3)), images_B3HW.std((2, 3))], 1)


def one_row(images_B3HW: Tensor) -> Tensor:
    """Wrong: one row for all images."""
    return images_B3HW.mean((0, 2, 3))[None]


instance = TinyNetwork()
number = 3
