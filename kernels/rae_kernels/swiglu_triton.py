"""Triton kernels of `swiglu`.

A program takes ROWS rows of some columns, a row at a time; backward it keeps the bias's sums in registers, and partial
sums are added up afterwards in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.launch import Launch


@triton.jit
def forward_kernel(x12, h, R, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = None if FULL else columns < F
    other = None if FULL else 0.0
    # int64: 2 R F passes 2^31 at the sizes of large batches.
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, min(first + ROWS, R)):
        gate = tl.load(x12 + row * 2 * F + columns, mask=mask, other=other).to(tl.float32)
        value = tl.load(x12 + row * 2 * F + F + columns, mask=mask, other=other).to(tl.float32)
        tl.store(h + row * F + columns, (gate * tl.sigmoid(gate) * value).to(h.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dh, x12, dx12, h, partials, R,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = None if FULL else columns < F
    other = None if FULL else 0.0
    sum_gate = tl.zeros([COLUMNS], tl.float32)
    sum_value = tl.zeros([COLUMNS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, min(first + ROWS, R)):
        narrow = row * F
        gate = tl.load(x12 + 2 * narrow + columns, mask=mask, other=other).to(tl.float32)
        value = tl.load(x12 + 2 * narrow + F + columns, mask=mask, other=other).to(tl.float32)
        d = tl.load(dh + narrow + columns, mask=mask, other=other).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = d * value * (sigmoid + silu * (1.0 - sigmoid))
        d_value = d * silu
        tl.store(dx12 + 2 * narrow + columns, d_gate.to(dx12.dtype.element_ty), mask=mask)
        tl.store(dx12 + 2 * narrow + F + columns, d_value.to(dx12.dtype.element_ty), mask=mask)
        tl.store(h + narrow + columns, (silu * value).to(h.dtype.element_ty), mask=mask)
        sum_gate += d_gate
        sum_value += d_value
    if BIAS:
        row_sums = partials + tl.program_id(0).to(tl.int64) * (2 * F)
        tl.store(row_sums + columns, sum_gate, mask=mask)
        tl.store(row_sums + F + columns, sum_value, mask=mask)


def tiling(rows: int, hidden: int, config: dict[str, int]) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """(grid, compile-time arguments) for `rows` rows of `hidden` channels."""
    columns = min(config["columns"], triton.next_power_of_2(hidden))
    constants = {"F": hidden, "ROWS": config["rows"], "COLUMNS": columns, "FULL": hidden % columns == 0}
    return (triton.cdiv(rows, config["rows"]), triton.cdiv(hidden, columns)), constants


def forward_launch(x12: Tensor, config: dict[str, int]) -> tuple[Launch, Tensor]:
    """The launch and its output h [..., F]."""
    hidden = x12.shape[-1] // 2
    rows = x12.numel() // x12.shape[-1]
    h = x12.new_empty(*x12.shape[:-1], hidden)
    grid, constants = tiling(rows, hidden, config)
    return Launch(forward_kernel, grid, {"x12": x12, "h": h, "R": rows}, constants, config["warps"], 1), h


def backward_launch(
    dh: Tensor, x12: Tensor, with_bias: bool, config: dict[str, int]
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch and its outputs: dx12, h, partial sums [groups of rows, 2 F] of dx12 (empty without bias)."""
    hidden = dh.shape[-1]
    rows = dh.numel() // hidden
    grid, constants = tiling(rows, hidden, config)
    outputs = (
        x12.new_empty(x12.shape),
        dh.new_empty(dh.shape),
        x12.new_empty((grid[0], 2 * hidden) if with_bias else 0, dtype=torch.float32),
    )
    launch = Launch(
        backward_kernel,
        grid,
        {"dh": dh, "x12": x12, "R": rows} | dict(zip(("dx12", "h", "partials"), outputs, strict=True)),
        constants | {"BIAS": with_bias},
        config["warps"],
        1,
    )
    return launch, outputs
