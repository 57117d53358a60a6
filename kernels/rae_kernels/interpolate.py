"""Stored latents to a training pair in one pass: de-quantize, draw noise, form x_t and the velocity to learn.

    z = stored * scale,    x_t = alpha z + sigma n,    u_t = alpha' z + sigma' n,    n ~ N(0, I)

The noise is counter-based, Philox 4x32-10 (Salmon et al., SC 2011) keyed by (seed, epoch) and counted by (element,
sample index, stream): the same integers as plain PyTorch's int64 arithmetic gives, in one pass for hundreds.

Shapes: B samples, C channels, HW positions, E = C H W elements of a sample.
"""

from __future__ import annotations

from math import prod, tau

import torch
from torch import Tensor

from rae_kernels import tuning
from rae_kernels.launch import use_triton

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# One block of the generator is four words, which are two pairs of normals: a kernel's thread makes four elements.
BLOCK = 4


def interpolate(
    stored_BCHW: Tensor,
    scale_BC: Tensor | None,
    factor: float,
    path_B4: Tensor,
    index_B: Tensor,
    *,
    seed: int,
    epoch: int,
    stream: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(x_t, u_t), both [B, C, H, W].

    Args:
        stored_BCHW: latents as they are stored: floating point or int8.
        scale_BC: scale of each channel of each sample, or None.
        factor: what all values are multiplied by; 1.0 for none.
        path_B4: float32; alpha, sigma, alpha' and sigma' of each sample's time.
        index_B: int64, sample indices.
        seed: below 2**32, half of the generator's key.
        epoch: the other half.
        stream: which of the streams of one (seed, epoch, sample).
        dtype: type of x_t; u_t is float32.
    """
    return interpolate_stored(stored_BCHW, scale_BC, factor, path_B4, index_B, seed, epoch, stream, dtype)


def normal(seed: int, epoch: int, index_B: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape], arguments as in `interpolate`: Box-Muller on pairs of words.

    With P = E / 2 pairs, words [0, P) are radii, u = (word >> 8 + 1) 2^-24, words [P, 2 P) angles; element p is
    sqrt(-2 ln u) cos(angle), element P + p the same with the sine.
    """
    count = prod(shape)
    pairs = (count + 1) // 2
    words = philox(seed, epoch, index_B, stream, 2 * pairs)
    u = ((words[:, :pairs] >> 8) + 1).to(torch.float32) * 2.0**-24
    angle = (words[:, pairs:] >> 8).to(torch.float32) * (tau * 2.0**-24)
    radius = torch.sqrt(-2.0 * torch.log(u))
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return values[:, :count].reshape(len(index_B), *shape)


def philox(seed: int, epoch: int, index_B: Tensor, stream: int, count: int) -> Tensor:
    """The first `count` words of each sample's stream, int64 [B, count]: word j of all blocks before word j + 1."""
    blocks = -(-count // BLOCK)
    index = index_B.to(torch.int64).reshape(-1, 1)
    c = [torch.arange(blocks, device=index.device).reshape(1, -1), index & MASK32, (index >> 32) & MASK32]
    c.append(torch.full_like(index, stream))
    key = [seed & MASK32, epoch & MASK32]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _multiply(c[0], MULTIPLIERS[0]), _multiply(c[2], MULTIPLIERS[1])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(k + w) & MASK32 for k, w in zip(key, WEYL, strict=True)]
    return torch.cat([w.expand(len(index), blocks) for w in c], dim=1)[:, :count]


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit words, by halves: the whole overflows int64."""
    low = (word & 0xFFFF) * constant
    high = (word >> 16) * constant + (low >> 16)
    return (high >> 16) & MASK32, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def reference(
    stored: Tensor, scale_BC: Tensor | None, factor: float, path_B4: Tensor, noise: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x_t, u_t) in plain PyTorch for given noise."""
    z = stored.float() * factor
    if scale_BC is not None:
        z = z * scale_BC.float()[:, :, None, None]
    alpha, sigma, d_alpha, d_sigma = (c.reshape(-1, 1, 1, 1) for c in path_B4.float().unbind(1))
    return (alpha * z + sigma * noise).to(dtype), d_alpha * z + d_sigma * noise


@torch.library.custom_op(
    "rae_kernels::interpolate",
    mutates_args=(),
    schema="(Tensor stored, Tensor? scale, float factor, Tensor path, Tensor index, SymInt seed, SymInt epoch, "
    "SymInt stream, ScalarType dtype) -> (Tensor, Tensor)",
)
def interpolate_stored(
    stored: Tensor,
    scale: Tensor | None,
    factor: float,
    path: Tensor,
    index: Tensor,
    seed: int,
    epoch: int,
    stream: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `interpolate`; no gradients: latents are data."""
    if use_triton(stored) and prod(stored.shape[1:]) % BLOCK == 0:
        from rae_kernels.interpolate_triton import forward_launch

        elements = prod(stored.shape[1:])
        config = tuning.lookup("interpolate", {"elements": elements}, stored.dtype, stored.device, DEFAULT_CONFIG)
        key = (seed & MASK32) | ((epoch & MASK32) << 32)
        launch, outputs = forward_launch(stored, scale, factor, path, index, key, stream, dtype, config)
        launch.run()
        return outputs
    noise = normal(seed, epoch, index, stream, tuple(stored.shape[1:]))
    return reference(stored, scale, factor, path, noise, dtype)


@interpolate_stored.register_fake
def _(stored, scale, factor, path, index, seed, epoch, stream, dtype):
    return stored.new_empty(stored.shape, dtype=dtype), stored.new_empty(stored.shape, dtype=torch.float32)


DEFAULT_CONFIG = {"blocks": 512, "warps": 4}
