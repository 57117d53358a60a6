"""Counter-based randomness: every draw is a pure function of (seed, epoch, sample index, stream, element).

Philox 4x32-10 (Salmon et al., SC 2011) on int64 tensors, so that a sample meets the same noise, timestep and label
drop whatever the batch size, the number of ranks, or the device (the integers are exact everywhere; the normal
variates differ between devices by the last bits of log and cos).

Shapes: B samples, E elements a sample.
"""

from __future__ import annotations

from enum import IntEnum
from math import prod, tau

import numpy as np
import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
# Philox 4x32 multipliers and Weyl increments (table 2 and section 3.2 of the paper).
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


class Stream(IntEnum):
    """Independent streams of randomness for one (seed, epoch, sample)."""

    NOISE = 0
    TIME = 1
    LABEL_DROP = 2
    VIEW = 3
    LATENT_NOISE = 4
    CROP = 5
    AUGMENT = 6
    SAMPLE = 7
    INIT = 8
    LATENT_NOISE_SCALE = 9


def uniform(seed: int, epoch: int | Tensor, index_B: Tensor, stream: Stream, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform float32 [B, *shape] in [0, 1) with 24 random bits each.

    Args:
        seed: any non-negative int below 2**32.
        epoch: epoch number, part of the key; int64 [1] on the device of `index_B` is as good.
        index_B: int64 [B], global sample indices; the result lives on its device.
        stream: which of the independent streams.
        shape: shape of one sample's draw.
    """
    words = _words(seed, epoch, index_B, stream, prod(shape))
    return ((words >> 8).to(torch.float32) * 2.0**-24).reshape(len(index_B), *shape)


def normal(seed: int, epoch: int | Tensor, index_B: Tensor, stream: Stream, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal float32 [B, *shape] by Box-Muller, arguments as in `uniform`."""
    count = prod(shape)
    pairs = (count + 1) // 2
    words = _words(seed, epoch, index_B, stream, 2 * pairs)
    # Both halves stay away from 0 so that the logarithm is finite: u in (0, 1].
    u = ((words[:, :pairs] >> 8) + 1).to(torch.float32) * 2.0**-24
    angle = (words[:, pairs:] >> 8).to(torch.float32) * (tau * 2.0**-24)
    radius = torch.sqrt(-2.0 * torch.log(u))
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return values[:, :count].reshape(len(index_B), *shape)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(n), int64 [n], the same on every machine."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def _words(seed: int, epoch: int | Tensor, index_B: Tensor, stream: Stream, count: int) -> Tensor:
    """The first `count` 32-bit words of each sample's stream, int64 [B, count] with values below 2**32."""
    blocks = (count + 3) // 4
    index = index_B.to(torch.int64).reshape(-1, 1)
    counters = (
        torch.arange(blocks, device=index.device, dtype=torch.int64).reshape(1, -1).expand(len(index), -1),
        index & MASK32,
        (index >> 32) & MASK32,
        torch.full((1, 1), int(stream), device=index.device, dtype=torch.int64),
    )
    words = _philox(counters, seed & MASK32, epoch & MASK32)
    return torch.cat([w.expand(len(index), blocks) for w in words], dim=1)[:, :count]


def _philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], key0: int, key1: int | Tensor) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counters
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, M0)
        high1, low1 = _multiply(c2, M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + W0) & MASK32, (key1 + W1) & MASK32
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * constant, both below 2**32."""
    if word.device.type == "xla":
        # By halves: the product overflows int64, and XLA does not shift what comes of that as the other devices do.
        low_part = (word & 0xFFFF) * constant
        high_part = (word >> 16) * constant + (low_part >> 16)
        return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
    product = word * constant
    return (product >> 32) & MASK32, product & MASK32
