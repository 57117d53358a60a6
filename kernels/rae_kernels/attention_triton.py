"""Triton kernel of `attention`, forward, and what forward and backward share: reading heads and turning them.

A head of D channels is read as a power of two of columns (main) and a padded rest (tail): 72 is 64 + 16 of which 8
count, where one power of two would multiply 128 columns. Strides within a row are compile-time constants: only so does
the compiler know that a head of 72 begins on 16 bytes, and loads 16 at once.

Softmax is base 2 inside, exp2(s log2(e)); the log-sum-exp that is kept is the natural one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.attention import Given
from rae_kernels.launch import Launch, power_of_two_split

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2.0))


@triton.jit
def load_tile(base, tokens, columns, N, ROW: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """[tokens, columns] of one head, zero beyond N tokens and D columns."""
    pointers = base + tokens[:, None] * ROW + columns[None, :]
    if EVEN and FULL:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif FULL:
        return tl.load(pointers, mask=(tokens < N)[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=(tokens < N)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_tile(
    base, tokens, columns, values, N, ROW: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr
):
    """The counterpart of `load_tile`."""
    pointers = base + tokens[:, None] * ROW + columns[None, :]
    values = values.to(base.dtype.element_ty)
    if EVEN and FULL:
        tl.store(pointers, values)
    elif EVEN:
        tl.store(pointers, values, mask=(columns < D)[None, :])
    elif FULL:
        tl.store(pointers, values, mask=(tokens < N)[:, None])
    else:
        tl.store(pointers, values, mask=(tokens < N)[:, None] & (columns < D)[None, :])


@triton.jit
def load_channels(base, columns, D: tl.constexpr, FULL: tl.constexpr):
    """One number a channel, in float32, as a row."""
    if FULL:
        return tl.load(base + columns).to(tl.float32)[None, :]
    else:
        return tl.load(base + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def turn(x, cos, sin, tokens, pairs, N, SIGN: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """Rotate interleaved pairs by SIGN times their angle: (a, b) -> (a cos - b sin, b cos + a sin)."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    c = load_tile(cos, tokens, pairs, N, D // 2, D // 2, EVEN, FULL)
    s = SIGN * load_tile(sin, tokens, pairs, N, D // 2, D // 2, EVEN, FULL)
    a, b = tl.split(tl.reshape(x, [rows, width // 2, 2]))
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), [rows, width])


@triton.jit
def mean_square(x, x_t, D: tl.constexpr, TAIL: tl.constexpr):
    """Mean over D channels of the squares, one a row; columns beyond D hold zero."""
    total = tl.sum(x * x, 1)
    if TAIL:
        total += tl.sum(x_t * x_t, 1)
    return total / D


@triton.jit
def plain_head(
    base, tokens, N, ROW: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr
):
    """(main, tail) of a head as it is stored."""
    x = load_tile(base, tokens, tl.arange(0, MAIN), N, ROW, D, EVEN, MAIN <= D)
    x_t = x
    if TAIL:
        x_t = load_tile(base, tokens, MAIN + tl.arange(0, TAIL), N, ROW, D, EVEN, MAIN + TAIL == D)
    return x, x_t


@triton.jit
def turned_head(
    base, weight, cos, sin, tokens, N, ROW: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    EVEN: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """(main, tail) of a query or key head, normalized and rotated in float32, in the type of the projection."""
    x, x_t = plain_head(base, tokens, N, ROW, D, MAIN, TAIL, EVEN)
    if NORM or ROPE:
        x, x_t = x.to(tl.float32), x_t.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(mean_square(x, x_t, D, TAIL) + EPS)[:, None]
        x = x * inverse * load_channels(weight, tl.arange(0, MAIN), D, MAIN <= D)
        if TAIL:
            x_t = x_t * inverse * load_channels(weight, MAIN + tl.arange(0, TAIL), D, MAIN + TAIL == D)
    if ROPE:
        x = turn(x, cos, sin, tokens, tl.arange(0, MAIN // 2), N, 1.0, D, EVEN, MAIN <= D)
        if TAIL:
            pairs = MAIN // 2 + tl.arange(0, TAIL // 2)
            x_t = turn(x_t, cos, sin, tokens, pairs, N, 1.0, D, EVEN, MAIN + TAIL == D)
    return x.to(base.dtype.element_ty), x_t.to(base.dtype.element_ty)


@triton.jit
def store_head(
    base, tokens, x, x_t, N, ROW: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Store (main, tail) of a head."""
    store_tile(base, tokens, tl.arange(0, MAIN), x, N, ROW, D, EVEN, MAIN <= D)
    if TAIL:
        store_tile(base, tokens, MAIN + tl.arange(0, TAIL), x_t, N, ROW, D, EVEN, MAIN + TAIL == D)


@triton.jit
def product(a, a_t, b, b_t, TAIL: tl.constexpr):
    """a b^T over all D channels, in float32."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if TAIL:
        s = tl.dot(a_t, tl.trans(b_t), s, input_precision="ieee")
    return s


@triton.jit
def forward_kernel(
    qkv, q_weight, k_weight, cos, sin, out, lse, turned, sample_stride, N,
    ROW: tl.constexpr, PART: tl.constexpr, HEAD: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys, with a running maximum and sum (Milakov, arXiv 1805.02867)."""
    tiles = tl.cdiv(N, QUERIES)
    pair = tl.program_id(0) // tiles
    sample, head = (pair // H).to(tl.int64), pair % H
    queries = (tl.program_id(0) % tiles) * QUERIES + tl.arange(0, QUERIES)
    base = qkv + sample * sample_stride + head * HEAD
    if KEEP:
        # What the backward pass would otherwise turn again for every tile; each program keeps its own rows.
        kept = turned + (sample * N * 2 * H + head) * D
        own, own_t = turned_head(base + PART, k_weight, cos, sin, queries, N, ROW, D, MAIN, TAIL, EVEN, NORM, ROPE, EPS)
        store_head(kept + H * D, queries, own, own_t, N, 2 * H * D, D, MAIN, TAIL, EVEN)
    q, q_t = turned_head(base, q_weight, cos, sin, queries, N, ROW, D, MAIN, TAIL, EVEN, NORM, ROPE, EPS)
    if KEEP:
        store_head(kept, queries, q, q_t, N, 2 * H * D, D, MAIN, TAIL, EVEN)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    o = tl.zeros([QUERIES, MAIN], tl.float32)
    o_t = tl.zeros([QUERIES, TAIL if TAIL else 16], tl.float32)
    for start in range(0, N, KEYS):
        keys = start + tl.arange(0, KEYS)
        k, k_t = turned_head(base + PART, k_weight, cos, sin, keys, N, ROW, D, MAIN, TAIL, EVEN, NORM, ROPE, EPS)
        s = product(q, q_t, k, k_t, TAIL) * (SCALE * LOG2E)
        if not EVEN:
            s = tl.where((keys < N)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v, v_t = plain_head(base + 2 * PART, keys, N, ROW, D, MAIN, TAIL, EVEN)
        p = p.to(v.dtype)
        o = tl.dot(p, v, o * shrink[:, None], input_precision="ieee")
        if TAIL:
            o_t = tl.dot(p, v_t, o_t * shrink[:, None], input_precision="ieee")
        top = new_top
    row = pair.to(tl.int64) * N + queries
    log_sum = (top + tl.log2(total)) * LN2
    out_base = out + sample * N * (H * D) + head * D
    store_head(out_base, queries, o / total[:, None], o_t / total[:, None], N, H * D, D, MAIN, TAIL, EVEN)
    if EVEN:
        tl.store(lse + row, log_sum)
    else:
        tl.store(lse + row, log_sum, mask=queries < N)


def constants(given: Given, eps: float) -> dict[str, object]:
    """The compile-time arguments that all kernels of one attention share."""
    heads, width = given.qkv.shape[3:]
    main, tail = power_of_two_split(width)
    forms = {"NORM": given.q_weight is not None, "ROPE": given.cos is not None, "EPS": eps}
    return {"H": heads, "D": width, "MAIN": main, "TAIL": tail, "SCALE": width**-0.5} | forms


def forward_launch(
    given: Given, eps: float, keep_turned: bool, config: dict[str, int]
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The forward launch and its outputs: out [B, N, H * D], the log-sum-exp [B, H, N], turned [B, N, 2, H, D]."""
    qkv = given.qkv
    samples, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(samples, tokens, heads * width)
    lse = qkv.new_empty(samples, heads, tokens, dtype=torch.float32)
    turned = qkv.new_empty((samples, tokens, 2, heads, width) if keep_turned else 0)
    even = tokens % config["queries"] == 0 and tokens % config["keys"] == 0
    launch = Launch(
        forward_kernel,
        (samples * heads * triton.cdiv(tokens, config["queries"]),),
        {name: qkv if tensor is None else tensor for name, tensor in given._asdict().items() if name != "bias"}
        | {"out": out, "lse": lse, "turned": turned, "sample_stride": qkv.stride(0), "N": tokens},
        constants(given, eps)
        | {"ROW": qkv.stride(1), "PART": qkv.stride(2), "HEAD": qkv.stride(3)}
        | {"QUERIES": config["queries"], "KEYS": config["keys"], "EVEN": even, "KEEP": keep_turned},
        config["warps"],
        config["stages"],
        config.get("registers"),
    )
    return launch, (out, lse, turned)
