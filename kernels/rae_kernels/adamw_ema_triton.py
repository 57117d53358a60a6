"""Triton kernel of `adamw_ema`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.launch import Launch


@triton.jit
def average(pointer, offsets, inside, param, rest):
    """e = e + (1 - d) (p - e)."""
    e = tl.load(pointer + offsets, mask=inside, other=0.0)
    tl.store(pointer + offsets, e + (param - e) * rest, mask=inside)


@triton.jit
def step_kernel(
    param, grad, exp_avg, exp_avg_sq, average0, average1, average2, average3, copy, grad_scale, found_inf,
    shrink, step_size, rest1, beta2, rest2, inverse_root, eps, move0, move1, move2, move3, P,
    AVERAGES: tl.constexpr, COPY: tl.constexpr, SCALE: tl.constexpr, GUARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < P
    change = inside
    if GUARD:
        change = inside & (tl.load(found_inf) + tl.zeros([BLOCK], tl.float32) == 0.0)
    p = tl.load(param + offsets, mask=inside, other=0.0)
    g = tl.load(grad + offsets, mask=change, other=0.0).to(tl.float32)
    if SCALE:
        g *= tl.load(grad_scale)
    m = tl.load(exp_avg + offsets, mask=change, other=0.0)
    m += (g - m) * rest1
    v = tl.load(exp_avg_sq + offsets, mask=change, other=0.0) * beta2 + g * g * rest2
    p = tl.where(change, p * shrink - step_size * m / (tl.sqrt(v) * inverse_root + eps), p)
    tl.store(exp_avg + offsets, m, mask=change)
    tl.store(exp_avg_sq + offsets, v, mask=change)
    tl.store(param + offsets, p, mask=change)
    if AVERAGES > 0:
        average(average0, offsets, change, p, move0)
    if AVERAGES > 1:
        average(average1, offsets, change, p, move1)
    if AVERAGES > 2:
        average(average2, offsets, change, p, move2)
    if AVERAGES > 3:
        average(average3, offsets, change, p, move3)
    if COPY:
        tl.store(copy + offsets, p.to(copy.dtype.element_ty), mask=inside)


def step_launch(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Sequence[Tensor],
    copy: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decays: Sequence[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    config: dict[str, int],
) -> Launch:
    """The launch of one step; everything that can be computed once is computed here, in float64."""
    spare = 4 - len(averages)
    tensors = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    tensors |= {f"average{k}": a for k, a in enumerate([*averages, *[param] * spare])}
    given = {"copy": copy, "grad_scale": grad_scale, "found_inf": found_inf}
    numbers = {
        "shrink": 1 - lr * weight_decay,
        "step_size": lr / (1 - beta1**step),
        "rest1": 1 - beta1,
        "beta2": beta2,
        "rest2": 1 - beta2,
        "inverse_root": 1 / math.sqrt(1 - beta2**step),
        "eps": eps,
    }
    numbers |= {f"move{k}": 1 - d for k, d in enumerate([*decays, *[1.0] * spare])}
    constants = {"AVERAGES": len(averages), "COPY": copy is not None, "SCALE": grad_scale is not None}
    constants |= {"GUARD": found_inf is not None, "BLOCK": config["block"]}
    arguments = tensors | {k: param if t is None else t for k, t in given.items()}
    grid = (triton.cdiv(param.numel(), config["block"]),)
    floats = {name: float(number) for name, number in numbers.items()}
    return Launch(step_kernel, grid, arguments | floats | {"P": param.numel()}, constants, config["warps"], 1)
