"""Triton kernels of `norm_modulate`: one pass over the rows forward, one backward.

A program takes ROWS tokens of one sample, a row at a time, and keeps the sums over its tokens in registers; the sums
of all programs are added up afterwards in fixed order, so that two runs agree to the bit. A row is a power of two of
columns (main) and a rest (tail): at 1152 a single power of two would leave 44 % of the lanes idle. Everything that a
row needs is loaded before its first reduction: a barrier would keep later loads from being under way meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.launch import Launch, power_of_two_split
from rae_kernels.norm_modulate import SAMPLE_SUMS, TOKEN_SUMS, Terms, is_per_token

# Four columns a lane; a few hundred programs for a batch of 256.
FINISH_SAMPLES, FINISH_COLUMNS, FINISH_WARPS = 4, 256, 2


@triton.jit
def load_columns(row, columns, C: tl.constexpr, FULL: tl.constexpr):
    """Columns of one row in float32, zero beyond C."""
    if FULL:
        return tl.load(row + columns).to(tl.float32)
    else:
        return tl.load(row + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def store_columns(row, columns, values, C: tl.constexpr, FULL: tl.constexpr):
    """Store columns of one row in the row's type."""
    if FULL:
        tl.store(row + columns, values.to(row.dtype.element_ty))
    else:
        tl.store(row + columns, values.to(row.dtype.element_ty), mask=columns < C)


@triton.jit
def add_branch(x, branch, gate, x_new, columns, C: tl.constexpr, FULL: tl.constexpr, BRANCH: tl.constexpr):
    """x + gate branch, stored and returned as the residual stream's type rounds it."""
    value = load_columns(x, columns, C, FULL)
    if BRANCH:
        value += load_columns(gate, columns, C, FULL) * load_columns(branch, columns, C, FULL)
        value = value.to(x_new.dtype.element_ty).to(tl.float32)
        store_columns(x_new, columns, value, C, FULL)
    return value


@triton.jit
def modulate(
    normed, scale, shift, weight, y, columns,
    C: tl.constexpr, FULL: tl.constexpr, WEIGHT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """y = normed weight (1 + scale) + shift."""
    if WEIGHT:
        normed *= load_columns(weight, columns, C, FULL)
    normed *= 1.0 + load_columns(scale, columns, C, FULL)
    if SHIFT:
        normed += load_columns(shift, columns, C, FULL)
    store_columns(y, columns, normed, C, FULL)


@triton.jit
def forward_kernel(
    x, branch, gate, scale, shift, weight, x_new, y, mean, rstd,
    x_sample, x_token, branch_sample, branch_token, gate_sample, gate_token,
    scale_sample, scale_token, shift_sample, shift_token, N,
    C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FULL_MAIN: tl.constexpr, FULL_TAIL: tl.constexpr,
    ROWS: tl.constexpr, BRANCH: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    WEIGHT: tl.constexpr, SHIFT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(N, ROWS)
    sample = (tl.program_id(0) // groups).to(tl.int64)
    first = (tl.program_id(0) % groups) * ROWS
    main = tl.arange(0, MAIN)
    tail = MAIN + tl.arange(0, TAIL if TAIL else 16)
    for token in range(first, min(first + ROWS, N)):
        row = sample * N + token
        x_row, x_new_row = x + sample * x_sample + token * x_token, x_new + row * C
        branch_row, gate_row = (
            branch + sample * branch_sample + token * branch_token,
            gate + sample * gate_sample + token * gate_token,
        )
        value = add_branch(x_row, branch_row, gate_row, x_new_row, main, C, FULL_MAIN, BRANCH)
        if TAIL:
            value_t = add_branch(x_row, branch_row, gate_row, x_new_row, tail, C, FULL_TAIL, BRANCH)
        if NORM:
            if LAYER:
                total = tl.sum(value)
                if TAIL:
                    total += tl.sum(value_t)
                centre = total / C
                tl.store(mean + row, centre)
                value = tl.where(main < C, value - centre, 0.0)
                if TAIL:
                    value_t = tl.where(tail < C, value_t - centre, 0.0)
            square = tl.sum(value * value)
            if TAIL:
                square += tl.sum(value_t * value_t)
            inverse = tl.rsqrt(square / C + EPS)
            tl.store(rstd + row, inverse)
            scale_row = scale + sample * scale_sample + token * scale_token
            shift_row = shift + sample * shift_sample + token * shift_token
            modulate(value * inverse, scale_row, shift_row, weight, y + row * C, main, C, FULL_MAIN, WEIGHT, SHIFT)
            if TAIL:
                modulate(
                    value_t * inverse, scale_row, shift_row, weight, y + row * C, tail, C, FULL_TAIL, WEIGHT, SHIFT
                )


@triton.jit
def norm_gradient(
    dy_row, x_row, scale_row, weight, dscale_row, dshift_row, centre, inverse, columns,
    C: tl.constexpr, FULL: tl.constexpr, LAYER: tl.constexpr, WEIGHT: tl.constexpr, SHIFT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """(dy, normed, gradient of normed, addend of the weight's gradient) of some columns of a row."""
    dy = load_columns(dy_row, columns, C, FULL)
    normed = load_columns(x_row, columns, C, FULL)
    if LAYER:
        normed -= centre
    normed *= inverse
    d_weight = dy * (1.0 + load_columns(scale_row, columns, C, FULL))
    d_normed = d_weight
    if WEIGHT:
        weight_row = load_columns(weight, columns, C, FULL)
        d_normed *= weight_row
    if PER_TOKEN:
        if WEIGHT:
            store_columns(dscale_row, columns, dy * normed * weight_row, C, FULL)
        else:
            store_columns(dscale_row, columns, dy * normed, C, FULL)
        if SHIFT:
            store_columns(dshift_row, columns, dy, C, FULL)
    return dy, normed, d_normed, d_weight * normed


@triton.jit
def branch_gradient(
    dx, branch, gate_row, dbranch_row, dgate_row, columns,
    C: tl.constexpr, FULL: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """(addend of the gate's gradient, gradient of the branch) of some columns of a row; the latter is stored."""
    dbranch = load_columns(gate_row, columns, C, FULL) * dx
    store_columns(dbranch_row, columns, dbranch, C, FULL)
    if PER_TOKEN:
        store_columns(dgate_row, columns, dx * branch, C, FULL)
    return dx * branch, dbranch


@triton.jit
def store_sums(row, columns, first, second, third, fourth, C: tl.constexpr, FULL: tl.constexpr,
               NORM: tl.constexpr, BRANCH: tl.constexpr, PER_TOKEN: tl.constexpr):  # fmt: skip
    """A program's sums over its tokens; which ones, says SAMPLE_SUMS or TOKEN_SUMS."""
    if PER_TOKEN:
        if NORM:
            store_columns(row, columns, second, C, FULL)
        if BRANCH:
            store_columns(row + C, columns, fourth, C, FULL)
    else:
        if NORM:
            store_columns(row, columns, first, C, FULL)
            store_columns(row + C, columns, second, C, FULL)
        if BRANCH:
            store_columns(row + 2 * C, columns, third, C, FULL)
            store_columns(row + 3 * C, columns, fourth, C, FULL)


@triton.jit
def backward_kernel(
    dx_new, dy, x_new, branch, gate, scale, weight, mean, rstd,
    dx, dbranch, dgate, dscale, dshift, partials,
    dx_new_sample, dx_new_token, dy_sample, dy_token, x_sample, x_token, branch_sample, branch_token,
    gate_sample, gate_token, scale_sample, scale_token, N,
    C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FULL_MAIN: tl.constexpr, FULL_TAIL: tl.constexpr,
    ROWS: tl.constexpr, SUMS: tl.constexpr, BRANCH: tl.constexpr, STREAM: tl.constexpr,
    NORM: tl.constexpr, LAYER: tl.constexpr, WEIGHT: tl.constexpr, SHIFT: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(N, ROWS)
    sample = (tl.program_id(0) // groups).to(tl.int64)
    first = (tl.program_id(0) % groups) * ROWS
    main = tl.arange(0, MAIN)
    tail = MAIN + tl.arange(0, TAIL if TAIL else 16)
    sum1 = tl.zeros([MAIN], tl.float32)
    sum2 = tl.zeros([MAIN], tl.float32)
    sum3 = tl.zeros([MAIN], tl.float32)
    sum4 = tl.zeros([MAIN], tl.float32)
    sum1_t = tl.zeros([TAIL if TAIL else 16], tl.float32)
    sum2_t = tl.zeros([TAIL if TAIL else 16], tl.float32)
    sum3_t = tl.zeros([TAIL if TAIL else 16], tl.float32)
    sum4_t = tl.zeros([TAIL if TAIL else 16], tl.float32)
    for token in range(first, min(first + ROWS, N)):
        row = sample * N + token
        gradient = tl.zeros([MAIN], tl.float32)
        gradient_t = tl.zeros([TAIL if TAIL else 16], tl.float32)
        if STREAM:
            stream_row = dx_new + sample * dx_new_sample + token * dx_new_token
            gradient = load_columns(stream_row, main, C, FULL_MAIN)
            if TAIL:
                gradient_t = load_columns(stream_row, tail, C, FULL_TAIL)
        if BRANCH:
            branch_row = branch + sample * branch_sample + token * branch_token
            branch_main = load_columns(branch_row, main, C, FULL_MAIN)
            if TAIL:
                branch_tail = load_columns(branch_row, tail, C, FULL_TAIL)
        if NORM:
            centre = tl.load(mean + row) if LAYER else 0.0
            inverse = tl.load(rstd + row)
            dy_row, x_row = dy + sample * dy_sample + token * dy_token, x_new + sample * x_sample + token * x_token
            scale_row = scale + sample * scale_sample + token * scale_token
            dy_main, normed, d_normed, d_weight = norm_gradient(
                dy_row, x_row, scale_row, weight, dscale + row * C, dshift + row * C, centre, inverse, main,
                C, FULL_MAIN, LAYER, WEIGHT, SHIFT, PER_TOKEN,
            )  # fmt: skip
            along = tl.sum(d_normed * normed)
            across = tl.sum(d_normed) if LAYER else 0.0
            if TAIL:
                dy_tail, normed_t, d_normed_t, d_weight_t = norm_gradient(
                    dy_row, x_row, scale_row, weight, dscale + row * C, dshift + row * C, centre, inverse, tail,
                    C, FULL_TAIL, LAYER, WEIGHT, SHIFT, PER_TOKEN,
                )  # fmt: skip
                along += tl.sum(d_normed_t * normed_t)
                if LAYER:
                    across += tl.sum(d_normed_t)
            gradient += inverse * (d_normed - normed * (along / C) - across / C)
            if PER_TOKEN:
                sum2 += d_weight
            else:
                sum1 += dy_main
                sum2 += dy_main * normed
            if TAIL:
                gradient_t += inverse * (d_normed_t - normed_t * (along / C) - across / C)
                if PER_TOKEN:
                    sum2_t += d_weight_t
                else:
                    sum1_t += dy_tail
                    sum2_t += dy_tail * normed_t
        if NORM:
            store_columns(dx + row * C, main, gradient, C, FULL_MAIN)
            if TAIL:
                store_columns(dx + row * C, tail, gradient_t, C, FULL_TAIL)
        if BRANCH:
            gate_row = gate + sample * gate_sample + token * gate_token
            d_gate, d_branch = branch_gradient(
                gradient, branch_main, gate_row, dbranch + row * C, dgate + row * C, main,
                C, FULL_MAIN, PER_TOKEN,
            )  # fmt: skip
            if PER_TOKEN:
                sum4 += d_branch
            else:
                sum3 += d_gate
                sum4 += gradient
            if TAIL:
                d_gate_t, d_branch_t = branch_gradient(
                    gradient_t, branch_tail, gate_row, dbranch + row * C, dgate + row * C, tail,
                    C, FULL_TAIL, PER_TOKEN,
                )  # fmt: skip
                if PER_TOKEN:
                    sum4_t += d_branch_t
                else:
                    sum3_t += d_gate_t
                    sum4_t += gradient_t
    sums_row = partials + tl.program_id(0).to(tl.int64) * (SUMS * C)
    store_sums(sums_row, main, sum1, sum2, sum3, sum4, C, FULL_MAIN, NORM, BRANCH, PER_TOKEN)
    if TAIL:
        store_sums(sums_row, tail, sum1_t, sum2_t, sum3_t, sum4_t, C, FULL_TAIL, NORM, BRANCH, PER_TOKEN)


@triton.jit
def finish_kernel(
    partials, gate, scale, weight, dgate, dscale, dshift, sums, gate_sample, scale_sample, B,
    C: tl.constexpr, GROUPS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
    BRANCH: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Modulation per sample: the partials of SAMPLES samples to gradients, and to addends of weight's and bias's."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * SAMPLES
    sum_weight = tl.zeros([COLUMNS], tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    for sample in range(first, min(first + SAMPLES, B)):
        sum1 = tl.zeros([COLUMNS], tl.float32)
        sum2 = tl.zeros([COLUMNS], tl.float32)
        sum3 = tl.zeros([COLUMNS], tl.float32)
        sum4 = tl.zeros([COLUMNS], tl.float32)
        for group in range(0, GROUPS):
            row = partials + (sample * GROUPS + group) * (4 * C)
            if NORM:
                sum1 += load_columns(row, columns, C, FULL)
                sum2 += load_columns(row + C, columns, C, FULL)
            if BRANCH:
                sum3 += load_columns(row + 2 * C, columns, C, FULL)
                sum4 += load_columns(row + 3 * C, columns, C, FULL)
        if NORM:
            if SHIFT:
                store_columns(dshift + sample * C, columns, sum1, C, FULL)
            if WEIGHT:
                sum_weight += sum2 * (1.0 + load_columns(scale + sample * scale_sample, columns, C, FULL))
                sum2 *= load_columns(weight, columns, C, FULL)
            store_columns(dscale + sample * C, columns, sum2, C, FULL)
        if BRANCH:
            store_columns(dgate + sample * C, columns, sum3, C, FULL)
            if BIAS:
                sum_bias += sum4 * load_columns(gate + sample * gate_sample, columns, C, FULL)
    row = sums + tl.program_id(0) * (2 * C)
    store_columns(row, columns, sum_weight, C, FULL)
    store_columns(row + C, columns, sum_bias, C, FULL)


def geometry(width: int) -> dict[str, int | bool]:
    """The compile-time split of a row of `width` columns."""
    main, tail = power_of_two_split(width)
    return {
        "C": width,
        "MAIN": main,
        "TAIL": tail,
        "FULL_MAIN": main <= width,
        "FULL_TAIL": main + tail == width,
    }


def pointers(stand_in: Tensor, **tensors: Tensor | None) -> dict[str, Tensor]:
    """The tensors by name, with another in the place of those that this form of the kernel never reads.

    Address arithmetic on an absent pointer would not compile, read or not.
    """
    return {name: stand_in if tensor is None else tensor for name, tensor in tensors.items()}


def row_strides(**tensors: Tensor | None) -> dict[str, int]:
    """Strides over samples and tokens of [B, N or 1, C] tensors; a token stride of 0 repeats one row for all tokens."""
    strides = {}
    for name, tensor in tensors.items():
        strides[f"{name}_sample"] = 0 if tensor is None else tensor.stride(0)
        strides[f"{name}_token"] = 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)
    return strides


def forward_launch(
    terms: Terms, eps: float, layer_norm: bool, dtype: torch.dtype, config: dict[str, int]
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The forward launch and its outputs (x_new, y, mean, rstd), empty where the form has none."""
    x, norm = terms.x, terms.scale is not None
    samples, tokens, width = x.shape
    outputs = (
        x.new_empty(0) if terms.branch is None else x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype) if norm else x.new_empty(0),
        x.new_empty(samples, tokens, dtype=torch.float32) if norm and layer_norm else x.new_empty(0),
        x.new_empty(samples, tokens, dtype=torch.float32) if norm else x.new_empty(0),
    )
    launch = Launch(
        forward_kernel,
        (samples * triton.cdiv(tokens, config["rows"]),),
        pointers(x, **{k: v for k, v in terms._asdict().items() if k != "bias"})
        | dict(zip(("x_new", "y", "mean", "rstd"), outputs, strict=True))
        | row_strides(x=x, branch=terms.branch, gate=terms.gate, scale=terms.scale, shift=terms.shift)
        | {"N": tokens},
        geometry(width) | forms(terms, layer_norm) | {"ROWS": config["rows"], "EPS": eps},
        config["warps"],
        1,
    )
    return launch, outputs


def forms(terms: Terms, layer_norm: bool) -> dict[str, bool]:
    """Which terms this form of the kernels has."""
    return {
        "BRANCH": terms.branch is not None,
        "NORM": terms.scale is not None,
        "LAYER": layer_norm,
        "WEIGHT": terms.weight is not None,
        "SHIFT": terms.shift is not None,
    }


def backward_launch(
    dx_new: Tensor | None,
    dy: Tensor | None,
    terms: Terms,
    mean: Tensor,
    rstd: Tensor,
    layer_norm: bool,
    config: dict[str, int],
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The backward launch and its outputs (dx, dbranch, dgate, dscale, dshift, partials).

    `terms.x` is the stream after the branch. Gradients of modulations are written here only if they are per token; else
    they are in the partials [samples * groups, sums, C], for `finish_launch`.
    """
    x, norm, branch = terms.x, terms.scale is not None, terms.branch is not None
    samples, tokens, width = x.shape
    per_token = is_per_token(terms)
    programs = samples * triton.cdiv(tokens, config["rows"])
    sums = len(TOKEN_SUMS if per_token else SAMPLE_SUMS)
    outputs = (
        x.new_empty(x.shape) if norm else x.new_empty(0),
        terms.branch.new_empty(x.shape) if branch else x.new_empty(0),
        terms.gate.new_empty(x.shape) if branch and per_token else x.new_empty(0),
        terms.scale.new_empty(x.shape) if norm and per_token else x.new_empty(0),
        terms.shift.new_empty(x.shape) if terms.shift is not None and per_token else x.new_empty(0),
        x.new_empty(programs, sums, width, dtype=torch.float32),
    )
    names = ("dx", "dbranch", "dgate", "dscale", "dshift", "partials")
    inputs = {k: v for k, v in terms._asdict().items() if k not in {"x", "shift", "bias"}} | {"x_new": x}
    launch = Launch(
        backward_kernel,
        (programs,),
        pointers(x, dx_new=dx_new, dy=dy, mean=mean, rstd=rstd, **inputs)
        | dict(zip(names, outputs, strict=True))
        | row_strides(dx_new=dx_new, dy=dy, x=x, branch=terms.branch, gate=terms.gate, scale=terms.scale)
        | {"N": tokens},
        geometry(width)
        | forms(terms, layer_norm)
        | {"ROWS": config["rows"], "SUMS": sums, "STREAM": dx_new is not None, "PER_TOKEN": per_token},
        config["warps"],
        1,
    )
    return launch, outputs


def finish_launch(terms: Terms, partials: Tensor) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launch after `backward_launch` where modulation is per sample.

    Its outputs are dgate, dscale, dshift (empty where the form has none) and addends [programs, 2, C] of the gradients
    of weight and bias.
    """
    samples, _, width = terms.x.shape
    columns = min(FINISH_COLUMNS, triton.next_power_of_2(width))
    programs = triton.cdiv(samples, FINISH_SAMPLES)
    outputs = (
        *(terms.x.new_empty(0) if m is None else m.new_empty(m.shape) for m in (terms.gate, terms.scale, terms.shift)),
        partials.new_empty(programs, 2, width),
    )
    strides = row_strides(gate=terms.gate, scale=terms.scale)
    launch = Launch(
        finish_kernel,
        (programs, triton.cdiv(width, columns)),
        pointers(partials, partials=partials, gate=terms.gate, scale=terms.scale, weight=terms.weight)
        | dict(zip(("dgate", "dscale", "dshift", "sums"), outputs, strict=True))
        | {name: strides[name] for name in ("gate_sample", "scale_sample")}
        | {"B": samples},
        {k: v for k, v in forms(terms, False).items() if k != "LAYER"}
        | {"C": width, "GROUPS": len(partials) // samples, "SAMPLES": FINISH_SAMPLES, "COLUMNS": columns}
        | {"FULL": width % columns == 0, "BIAS": terms.bias is not None},
        FINISH_WARPS,
        1,
    )
    return launch, outputs
