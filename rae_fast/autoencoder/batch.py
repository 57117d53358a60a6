"""One micro-batch of decoder training, wherever it came from.

Shapes: B images of one rank's micro-batch, N tokens of C channels, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecoderBatch:
    """One micro-batch of one rank, on the training device.

    Attributes:
        tokens_BNC: latents without noise, before normalization, float32.
        images_B3SS: the images they are of, float32 in [0, 1].
        index_B: int64, the key of all per-sample randomness.
        epoch: which epoch it belongs to.
    """

    tokens_BNC: Tensor
    images_B3SS: Tensor
    index_B: Tensor
    epoch: int


def as_tokens(z_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, C], row by row."""
    return z_BCHW.flatten(2).transpose(1, 2)
