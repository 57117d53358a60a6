"""Triton kernels of `attention`, backward: one for the queries' gradient, one for the keys' and values'.

Each program owns its rows of the result and recomputes the probabilities it needs, so nothing is added up across
programs but the gradients of bias and norm weights, whose partial sums are added in fixed order afterwards:

    P = exp(S - lse), dV = P^T dO, dP = dO V^T, delta = rowsum(dO O), dS = P (dP - delta)
    dQ = scale dS K, dK = scale dS^T Q            (Dao, arXiv 2307.08691, section 3.1)

One kernel for all three would need five products in the place of seven, but more registers than a thread has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.attention import Given
from rae_kernels.attention_triton import (
    LOG2E,
    constants,
    load_channels,
    mean_square,
    plain_head,
    product,
    store_head,
    turn,
    turned_head,
)
from rae_kernels.launch import Launch


@triton.jit
def load_row_numbers(base, rows, N, other, EVEN: tl.constexpr):
    """One float32 a row; `other` beyond N."""
    if EVEN:
        return tl.load(base + rows)
    else:
        return tl.load(base + rows, mask=rows < N, other=other)


@triton.jit
def store_column_sums(base, columns, values, rows, N, D: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """Sum over the rows below N of each column, stored in float32."""
    if not EVEN:
        values = tl.where((rows < N)[:, None], values, 0.0)
    if FULL:
        tl.store(base + columns, tl.sum(values, 0))
    else:
        tl.store(base + columns, tl.sum(values, 0), mask=columns < D)


@triton.jit
def store_gradient(
    g, g_t, raw, d_base, weight, d_bias, d_weight, cos, sin, rows, N,
    ROW: tl.constexpr, D_ROW: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Take the gradient of a turned head back through rotation and norm, store it and its sums over the rows.

    Norm: with n = x r, r = 1 / rms(x), and h = g weight: dx = r (h - n mean(h n)), dweight = sum(g n).
    """
    main = tl.arange(0, MAIN)
    tail = MAIN + tl.arange(0, TAIL if TAIL else 16)
    if ROPE:
        g = turn(g, cos, sin, rows, tl.arange(0, MAIN // 2), N, -1.0, D, EVEN, MAIN <= D)
        if TAIL:
            pairs = MAIN // 2 + tl.arange(0, TAIL // 2)
            g_t = turn(g_t, cos, sin, rows, pairs, N, -1.0, D, EVEN, MAIN + TAIL == D)
    if NORM:
        x, x_t = plain_head(raw, rows, N, ROW, D, MAIN, TAIL, EVEN)
        x, x_t = x.to(tl.float32), x_t.to(tl.float32)
        inverse = tl.rsqrt(mean_square(x, x_t, D, TAIL) + EPS)[:, None]
        x *= inverse
        store_column_sums(d_weight, main, g * x, rows, N, D, EVEN, MAIN <= D)
        g *= load_channels(weight, main, D, MAIN <= D)
        along = tl.sum(g * x, 1)
        if TAIL:
            x_t *= inverse
            store_column_sums(d_weight, tail, g_t * x_t, rows, N, D, EVEN, MAIN + TAIL == D)
            g_t *= load_channels(weight, tail, D, MAIN + TAIL == D)
            along += tl.sum(g_t * x_t, 1)
        g = inverse * (g - x * (along / D)[:, None])
        if TAIL:
            g_t = inverse * (g_t - x_t * (along / D)[:, None])
    store_head(d_base, rows, g, g_t, N, D_ROW, D, MAIN, TAIL, EVEN)
    if BIAS:
        store_column_sums(d_bias, main, g, rows, N, D, EVEN, MAIN <= D)
        if TAIL:
            store_column_sums(d_bias, tail, g_t, rows, N, D, EVEN, MAIN + TAIL == D)


@triton.jit
def queries_kernel(
    qkv, heads, q_weight, k_weight, cos, sin, out, d_out, lse, delta, d_qkv, d_bias, d_weight,
    sample_stride, heads_sample, d_out_sample, N,
    ROW: tl.constexpr, PART: tl.constexpr, HEAD: tl.constexpr, HEADS_ROW: tl.constexpr, HEADS_PART: tl.constexpr,
    HEADS_HEAD: tl.constexpr, D_OUT_ROW: tl.constexpr, H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, TURNED: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of one head's queries; on the way, delta = rowsum(dO O) for the other kernel."""
    TURN_NORM: tl.constexpr = NORM and not TURNED
    TURN_ROPE: tl.constexpr = ROPE and not TURNED
    tiles = tl.cdiv(N, QUERIES)
    pair = tl.program_id(0) // tiles
    sample, head = (pair // H).to(tl.int64), pair % H
    queries = (tl.program_id(0) % tiles) * QUERIES + tl.arange(0, QUERIES)
    base = qkv + sample * sample_stride + head * HEAD
    heads_base = heads + sample * heads_sample + head * HEADS_HEAD
    q, q_t = turned_head(
        heads_base, q_weight, cos, sin, queries, N, HEADS_ROW, D, MAIN, TAIL, EVEN, TURN_NORM, TURN_ROPE, EPS
    )
    o, o_t = plain_head(out + sample * N * (H * D) + head * D, queries, N, H * D, D, MAIN, TAIL, EVEN)
    d_o, d_o_t = plain_head(d_out + sample * d_out_sample + head * D, queries, N, D_OUT_ROW, D, MAIN, TAIL, EVEN)
    row_delta = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
    if TAIL:
        row_delta += tl.sum(d_o_t.to(tl.float32) * o_t.to(tl.float32), 1)
    numbers = pair.to(tl.int64) * N
    if EVEN:
        tl.store(delta + numbers + queries, row_delta)
    else:
        tl.store(delta + numbers + queries, row_delta, mask=queries < N)
    row_lse = load_row_numbers(lse + numbers, queries, N, float("inf"), EVEN) * LOG2E
    d_q = tl.zeros([QUERIES, MAIN], tl.float32)
    d_q_t = tl.zeros([QUERIES, TAIL if TAIL else 16], tl.float32)
    for start in range(0, N, KEYS):
        keys = start + tl.arange(0, KEYS)
        k, k_t = turned_head(
            heads_base + HEADS_PART, k_weight, cos, sin, keys, N,
            HEADS_ROW, D, MAIN, TAIL, EVEN, TURN_NORM, TURN_ROPE, EPS,
        )  # fmt: skip
        p = tl.exp2(product(q, q_t, k, k_t, TAIL) * (SCALE * LOG2E) - row_lse[:, None])
        if not EVEN:
            p = tl.where((keys < N)[None, :], p, 0.0)
        v, v_t = plain_head(base + 2 * PART, keys, N, ROW, D, MAIN, TAIL, EVEN)
        d_s = (p * (product(d_o, d_o_t, v, v_t, TAIL) - row_delta[:, None])).to(k.dtype)
        d_q = tl.dot(d_s, k, d_q, input_precision="ieee")
        if TAIL:
            d_q_t = tl.dot(d_s, k_t, d_q_t, input_precision="ieee")
    sums = tl.program_id(0).to(tl.int64) * D
    store_gradient(
        d_q * SCALE, d_q_t * SCALE, base, d_qkv + (sample * N * 3 * H + head) * D, q_weight,
        d_bias + sums, d_weight + sums, cos, sin, queries, N,
        ROW, 3 * H * D, D, MAIN, TAIL, EVEN, BIAS, NORM, ROPE, EPS,
    )  # fmt: skip


@triton.jit
def keys_kernel(
    qkv, heads, q_weight, k_weight, cos, sin, d_out, lse, delta, d_qkv, d_bias, d_weight,
    sample_stride, heads_sample, d_out_sample, N,
    ROW: tl.constexpr, PART: tl.constexpr, HEAD: tl.constexpr, HEADS_ROW: tl.constexpr, HEADS_PART: tl.constexpr,
    HEADS_HEAD: tl.constexpr, D_OUT_ROW: tl.constexpr, H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, TURNED: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of one head's keys and values, with keys as rows: P^T and dS^T feed products as they are."""
    TURN_NORM: tl.constexpr = NORM and not TURNED
    TURN_ROPE: tl.constexpr = ROPE and not TURNED
    tiles = tl.cdiv(N, KEYS)
    pair = tl.program_id(0) // tiles
    sample, head = (pair // H).to(tl.int64), pair % H
    keys = (tl.program_id(0) % tiles) * KEYS + tl.arange(0, KEYS)
    base = qkv + sample * sample_stride + head * HEAD
    heads_base = heads + sample * heads_sample + head * HEADS_HEAD
    k, k_t = turned_head(
        heads_base + HEADS_PART, k_weight, cos, sin, keys, N,
        HEADS_ROW, D, MAIN, TAIL, EVEN, TURN_NORM, TURN_ROPE, EPS,
    )  # fmt: skip
    v, v_t = plain_head(base + 2 * PART, keys, N, ROW, D, MAIN, TAIL, EVEN)
    numbers = pair.to(tl.int64) * N
    d_out_base = d_out + sample * d_out_sample + head * D
    d_k = tl.zeros([KEYS, MAIN], tl.float32)
    d_v = tl.zeros([KEYS, MAIN], tl.float32)
    d_k_t = tl.zeros([KEYS, TAIL if TAIL else 16], tl.float32)
    d_v_t = tl.zeros([KEYS, TAIL if TAIL else 16], tl.float32)
    for start in range(0, N, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        q, q_t = turned_head(
            heads_base, q_weight, cos, sin, queries, N, HEADS_ROW, D, MAIN, TAIL, EVEN, TURN_NORM, TURN_ROPE, EPS
        )
        row_lse = load_row_numbers(lse + numbers, queries, N, float("inf"), EVEN) * LOG2E
        p = tl.exp2(product(k, k_t, q, q_t, TAIL) * (SCALE * LOG2E) - row_lse[None, :])
        d_o, d_o_t = plain_head(d_out_base, queries, N, D_OUT_ROW, D, MAIN, TAIL, EVEN)
        d_v = tl.dot(p.to(d_o.dtype), d_o, d_v, input_precision="ieee")
        if TAIL:
            d_v_t = tl.dot(p.to(d_o.dtype), d_o_t, d_v_t, input_precision="ieee")
        row_delta = load_row_numbers(delta + numbers, queries, N, 0.0, EVEN)
        d_s = (p * (product(v, v_t, d_o, d_o_t, TAIL) - row_delta[None, :])).to(q.dtype)
        d_k = tl.dot(d_s, q, d_k, input_precision="ieee")
        if TAIL:
            d_k_t = tl.dot(d_s, q_t, d_k_t, input_precision="ieee")
    sums = tl.program_id(0).to(tl.int64) * D
    d_bias += 2 * sums
    d_base = d_qkv + ((sample * N * 3 + 1) * H + head) * D
    store_gradient(
        d_v, d_v_t, base, d_base + H * D, k_weight, d_bias + D, d_weight, cos, sin, keys, N,
        ROW, 3 * H * D, D, MAIN, TAIL, EVEN, BIAS, False, False, EPS,
    )  # fmt: skip
    store_gradient(
        d_k * SCALE, d_k_t * SCALE, base + PART, d_base, k_weight, d_bias, d_weight + sums, cos, sin, keys, N,
        ROW, 3 * H * D, D, MAIN, TAIL, EVEN, BIAS, NORM, ROPE, EPS,
    )  # fmt: skip


def backward_launches(
    d_out: Tensor,
    given: Given,
    out: Tensor,
    lse: Tensor,
    turned: Tensor,
    eps: float,
    config: dict[str, dict[str, int]],
) -> tuple[tuple[Launch, Launch], dict[str, Tensor]]:
    """Both launches, in their order, and what they write.

    Results by name: d_qkv [B, N, 3, H, D]; sums over the rows of each program: d_bias_q [B, H, tiles, 1, D], d_bias_kv
    [B, H, tiles, 2, D], d_weight_q and d_weight_kv [programs, D] (empty where the form has none).
    """
    qkv = given.qkv
    samples, tokens, _, heads, width = qkv.shape
    source = turned if turned.numel() else qkv
    arguments = {name: qkv if t is None else t for name, t in given._asdict().items() if name != "bias"}
    arguments |= {"heads": source, "d_out": d_out, "lse": lse, "delta": torch.empty_like(lse), "N": tokens}
    arguments |= {"sample_stride": qkv.stride(0), "heads_sample": source.stride(0), "d_out_sample": d_out.stride(0)}
    fixed = constants(given, eps) | {"BIAS": given.bias is not None, "TURNED": turned.numel() > 0}
    fixed |= {"ROW": qkv.stride(1), "PART": qkv.stride(2), "HEAD": qkv.stride(3), "D_OUT_ROW": d_out.stride(1)}
    fixed |= {"HEADS_ROW": source.stride(1), "HEADS_PART": source.stride(2), "HEADS_HEAD": source.stride(3)}
    results = {"d_qkv": qkv.new_empty(qkv.shape)}
    launches = []
    for kernel, side, owned, parts in ((queries_kernel, "q", "queries", 1), (keys_kernel, "kv", "keys", 2)):
        tile = config[owned]
        tiles = triton.cdiv(tokens, tile[owned])
        programs = samples * heads * tiles
        rows = (samples, heads, tiles, parts) if given.bias is not None else (0,)
        results[f"d_bias_{side}"] = lse.new_empty(*rows, width)
        results[f"d_weight_{side}"] = lse.new_empty(0 if given.q_weight is None else programs, width)
        written = {"d_qkv": results["d_qkv"], "d_bias": results[f"d_bias_{side}"]}
        written |= {"d_weight": results[f"d_weight_{side}"]} | ({"out": out} if side == "q" else {})
        tiling = {"QUERIES": tile["queries"], "KEYS": tile["keys"]}
        tiling["EVEN"] = tokens % tile["queries"] == 0 and tokens % tile["keys"] == 0
        options = (tile["warps"], tile["stages"], tile.get("registers"))
        launches.append(Launch(kernel, (programs,), arguments | written, fixed | tiling, *options))
    return (launches[0], launches[1]), results
