"""Triton kernel of `interpolate`: a program makes BLOCKS blocks of the generator, four elements of one sample each.

The four elements of a block lie E / 4 apart, as the generator's words are laid out, so all accesses are contiguous.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.launch import Launch

PI: tl.constexpr = tl.constexpr(3.14159265358979)


@triton.jit
def sine_cosine(word):
    """Sine and cosine of 2 pi (word >> 8) / 2^24, with the angle in exact parts: eighth of a turn, and rest.

    Within an eighth turn of the nearest axis, Taylor's polynomials err by less than float32's rounding.
    """
    bits = (word >> 8).to(tl.int32)
    quarter = ((bits + (1 << 21)) >> 22) & 3
    rest = (bits - (((bits + (1 << 21)) >> 22) << 22)).to(tl.float32) * (PI / (1 << 23))
    square = rest * rest
    s = rest * (1.0 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    c = 1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square * (1 / 3628800)))
    c = 1.0 + square * (-1 / 2 + square * c)
    odd = (quarter & 1) == 1
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where(quarter >= 2, -sine, sine)
    cosine = tl.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    return sine, cosine


@triton.jit
def radius(word):
    """sqrt(-2 ln u), u = (word >> 8 + 1) / 2^24 in (0, 1]."""
    u = ((word >> 8) + 1).to(tl.float32) * (1.0 / (1 << 24))
    return tl.sqrt(-2.0 * tl.log(u))


@triton.jit
def store_pair(noise, element, stored, scale, factor, path, x, target, inside, HW: tl.constexpr, SCALE: tl.constexpr):
    """x_t and u_t of some elements; pointers are those of the sample."""
    z = tl.load(stored + element, mask=inside, other=0).to(tl.float32) * factor
    if SCALE:
        z *= tl.load(scale + element // HW, mask=inside, other=0.0).to(tl.float32)
    x_t = tl.load(path) * z + tl.load(path + 1) * noise
    u_t = tl.load(path + 2) * z + tl.load(path + 3) * noise
    tl.store(x + element, x_t.to(x.dtype.element_ty), mask=inside)
    tl.store(target + element, u_t, mask=inside)


@triton.jit(do_not_specialize=["key"])
def forward_kernel(
    stored, scale, path, index, x, target, factor, key, scale_sample,
    STREAM: tl.constexpr, E: tl.constexpr, HW: tl.constexpr, BLOCKS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    QUARTER: tl.constexpr = E // 4
    programs: tl.constexpr = (QUARTER + BLOCKS - 1) // BLOCKS
    sample = (tl.program_id(0) // programs).to(tl.int64)
    block = (tl.program_id(0) % programs) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < QUARTER
    number = tl.load(index + sample)
    low, high = (number & 0xFFFFFFFF).to(tl.uint32), ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros([BLOCKS], tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, block.to(tl.uint32), zero + low, zero + high, zero + STREAM)
    stored += sample * E
    x += sample * E
    target += sample * E
    path += sample * 4
    scale += sample * scale_sample
    sine, cosine = sine_cosine(w2)
    r = radius(w0)
    store_pair(r * cosine, block, stored, scale, factor, path, x, target, inside, HW, SCALE)
    store_pair(r * sine, block + 2 * QUARTER, stored, scale, factor, path, x, target, inside, HW, SCALE)
    sine, cosine = sine_cosine(w3)
    r = radius(w1)
    store_pair(r * cosine, block + QUARTER, stored, scale, factor, path, x, target, inside, HW, SCALE)
    store_pair(r * sine, block + 3 * QUARTER, stored, scale, factor, path, x, target, inside, HW, SCALE)


def forward_launch(
    stored: Tensor,
    scale: Tensor | None,
    factor: float,
    path: Tensor,
    index: Tensor,
    key: int,
    stream: int,
    dtype: torch.dtype,
    config: dict[str, int],
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The launch and its outputs x_t and u_t; `key` is the generator's, 64 bits."""
    stored, path = stored.contiguous(), path.contiguous()
    elements = prod(stored.shape[1:])
    outputs = stored.new_empty(stored.shape, dtype=dtype), stored.new_empty(stored.shape, dtype=torch.float32)
    scale = None if scale is None else scale.contiguous()
    arguments = {"stored": stored, "scale": stored if scale is None else scale, "path": path, "index": index}
    arguments |= {"x": outputs[0], "target": outputs[1], "factor": float(factor)}
    # As Triton takes an int64: the upper half of the keys is negative.
    arguments |= {"key": key - (1 << 64) if key >> 63 else key, "scale_sample": 0 if scale is None else scale.stride(0)}
    constants = {"STREAM": stream, "E": elements, "HW": prod(stored.shape[2:]), "SCALE": scale is not None}
    constants["BLOCKS"] = config["blocks"]
    grid = (len(stored) * triton.cdiv(elements // 4, config["blocks"]),)
    return Launch(forward_kernel, grid, arguments, constants, config["warps"], 1), outputs
