"""Softmax attention on packed projections, with normalization and 2-D rotation of queries and keys inside.

    out = softmax(turn(q) turn(k)^T / sqrt(D)) v,    turn(x) = rotate(x / rms(x) * weight)

Shapes: B samples, N tokens, H heads, D channels of a head; qkv [B, N, 3, H, D] as the projection wrote it, out
[B, N, H * D] as the next one reads it, so that nothing is transposed. Cosines and sines are [N, D / 2], one angle for
each interleaved pair of channels (Su et al., arXiv 2104.09864); half of the pairs encode the row, half the column.

Where PyTorch's own attention measures faster, or nothing was measured, `attention` takes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rae_kernels import tuning
from rae_kernels.launch import INTERPRETING, dense_rows, use_triton

TRITON, SDPA = "triton", "sdpa"


class Given(NamedTuple):
    """The tensors of one attention.

    Attributes:
        qkv: [B, N, 3, H, D], its bias already added.
        bias: that bias [3 * H * D], only so that its gradient is made on the way: where it is given, the projection
            should use `bias.detach()`.
        q_weight: weight [D] of the queries' RMS norm, or None for no norm.
        k_weight: the same for the keys.
        cos: [N, D / 2], or None for no rotation.
        sin: like cos.
    """

    qkv: Tensor
    bias: Tensor | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


def attention(given: Given, eps: float = 1e-6, implementation: str | None = None) -> Tensor:
    """Attention [B, N, H * D] by whichever implementation is the faster here, or by the one that is named.

    Args:
        given: the projections and what turns them.
        eps: added to the mean square in the norms.
        implementation: "triton" or "sdpa"; by default what `chosen` says.
    """
    if torch.is_autocast_enabled(given.qkv.device.type):
        given = given._replace(qkv=given.qkv.to(torch.get_autocast_dtype(given.qkv.device.type)))
    qkv = given.qkv
    if implementation is None:
        implementation = chosen(qkv.shape[1], qkv.shape[4], qkv.dtype, qkv.device)
    if implementation == SDPA:
        return reference(given, eps)
    keep = (given.cos is not None or given.q_weight is not None) and torch.is_grad_enabled() and qkv.requires_grad
    return packed_attention(*given, eps, keep)[0]


@torch.compiler.assume_constant_result
def chosen(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Which implementation `attention` takes for heads of `width` channels over `tokens` tokens."""
    if device.type != "cuda":
        return TRITON if INTERPRETING else SDPA
    if dtype not in (torch.bfloat16, torch.float16):
        return SDPA
    shape = {"tokens": tokens, "head": width}
    return tuning.lookup("attention", shape, dtype, device, {"implementation": SDPA})["implementation"]


def reference(given: Given, eps: float) -> Tensor:
    """The operation in plain PyTorch, with its own attention."""
    qkv = given.qkv
    if given.bias is not None:
        # Adds nothing to the value, and the column sums of the gradient to the bias's.
        qkv = qkv + (given.bias - given.bias.detach()).to(qkv.dtype).unflatten(0, qkv.shape[2:])
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q = turn(q, given.q_weight, given.cos, given.sin, eps)
    k = turn(k, given.k_weight, given.cos, given.sin, eps)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def turn(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """Queries or keys [B, H, N, D] normalized and rotated in float32 or above, in the type of `x`."""
    wide = _wide(x)
    if weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)
    if cos is not None and sin is not None:
        wide = rotate(wide, cos, sin)
    return wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


@torch.library.custom_op(
    "rae_kernels::attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor? bias, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
    "bool keep_turned) -> (Tensor, Tensor, Tensor)",
)
def packed_attention(
    qkv: Tensor,
    bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    keep_turned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log-sum-exp [B, H, N], turned queries and keys [B, N, 2, H, D] for the backward pass, or empty)."""
    given = _dense(Given(qkv, bias, q_weight, k_weight, cos, sin))
    if use_triton(qkv):
        from rae_kernels.attention_triton import forward_launch

        launch, outputs = forward_launch(given, eps, keep_turned, _config("forward", qkv))
        launch.run()
        return outputs
    q, k, v = given.qkv.permute(2, 0, 3, 1, 4)
    q, k = turn(q, q_weight, cos, sin, eps), turn(k, k_weight, cos, sin, eps)
    scores = _wide(q) @ _wide(k).mT * q.shape[-1] ** -0.5
    out = (torch.softmax(scores, -1) @ _wide(v)).to(v.dtype).transpose(1, 2).flatten(2)
    turned = torch.stack([q, k]).permute(1, 3, 0, 2, 4).contiguous() if keep_turned else qkv.new_empty(0)
    return out, torch.logsumexp(scores, -1), turned


@packed_attention.register_fake
def _(qkv, bias, q_weight, k_weight, cos, sin, eps, keep_turned):
    samples, tokens, _, heads, width = qkv.shape
    turned = qkv.new_empty((samples, tokens, 2, heads, width) if keep_turned else 0)
    return qkv.new_empty(samples, tokens, heads * width), _wide(qkv).new_empty(samples, heads, tokens), turned


@torch.library.custom_op(
    "rae_kernels::attention_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor qkv, Tensor? bias, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "Tensor out, Tensor lse, Tensor turned, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def packed_attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    lse: Tensor,
    turned: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_qkv [B, N, 3, H, D], d_bias, d_q_weight, d_k_weight); empty where the form lacks the input."""
    given = _dense(Given(qkv, bias, q_weight, k_weight, cos, sin))
    if not use_triton(qkv):
        return reference_backward(d_out, given, out, lse, eps)
    from rae_kernels.attention_backward_triton import backward_launches

    config = {"queries": _config("backward.queries", qkv), "keys": _config("backward.keys", qkv)}
    launches, made = backward_launches(dense_rows(d_out), given, out, lse, turned, eps, config)
    for launch in launches:
        launch.run()
    d_bias, d_q_weight, d_k_weight = (qkv.new_empty(0) for _ in range(3))
    if bias is not None:
        sums = torch.cat([made["d_bias_q"].sum((0, 2)), made["d_bias_kv"].sum((0, 2))], dim=1)
        d_bias = sums.transpose(0, 1).flatten().to(bias.dtype)
    if q_weight is not None and k_weight is not None:
        d_q_weight, d_k_weight = made["d_weight_q"].sum(0), made["d_weight_kv"].sum(0)
        d_q_weight, d_k_weight = d_q_weight.to(q_weight.dtype), d_k_weight.to(k_weight.dtype)
    return made["d_qkv"], d_bias, d_q_weight, d_k_weight


@packed_attention_backward.register_fake
def _(d_out, qkv, bias, q_weight, k_weight, cos, sin, out, lse, turned, eps):
    others = (qkv.new_empty(0) if t is None else torch.empty_like(t) for t in (bias, q_weight, k_weight))
    return qkv.new_empty(qkv.shape), *others


def reference_backward(d_out: Tensor, given: Given, out: Tensor, lse: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The backward pass written out; (d_qkv, d_bias, d_q_weight, d_k_weight).

    P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D)
    """
    qkv, heads = given.qkv, given.qkv.shape[3:]
    raw_q, raw_k, v = (_wide(t) for t in qkv.permute(2, 0, 3, 1, 4))
    q = turn(raw_q, given.q_weight, given.cos, given.sin, eps)
    k = turn(raw_k, given.k_weight, given.cos, given.sin, eps)
    d_o, o = (_wide(t).unflatten(-1, heads).transpose(1, 2) for t in (d_out, out))
    scale = q.shape[-1] ** -0.5
    p = torch.exp(q @ k.mT * scale - lse[..., None])
    d_s = p * (d_o @ v.mT - (d_o * o).sum(-1, keepdim=True)) * scale
    d_q, d_q_weight = _turn_gradient(d_s @ k, raw_q, given.q_weight, given, eps)
    d_k, d_k_weight = _turn_gradient(d_s.mT @ q, raw_k, given.k_weight, given, eps)
    d_qkv = torch.stack([d_q, d_k, p.mT @ d_o]).permute(1, 3, 0, 2, 4)
    d_bias = qkv.new_empty(0) if given.bias is None else d_qkv.sum((0, 1)).flatten().to(given.bias.dtype)
    return d_qkv.to(qkv.dtype).contiguous(), d_bias, d_q_weight, d_k_weight


def _turn_gradient(g: Tensor, x: Tensor, weight: Tensor | None, given: Given, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients with respect to a raw head and its norm's weight from the one of the turned head."""
    if given.cos is not None and given.sin is not None:
        g = rotate(g, given.cos, -given.sin)
    if weight is None:
        return g, x.new_empty(0)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, h = x * inverse, g * _wide(weight)
    d_x = inverse * (h - normed * (h * normed).mean(-1, keepdim=True))
    return d_x, (g * normed).sum((0, 1, 2)).to(weight.dtype)


def _save(ctx, inputs, output) -> None:
    *given, eps, _ = inputs
    ctx.save_for_backward(*given, *output)
    ctx.eps = eps
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, _d_lse, _d_turned):
    *given, out, lse, turned = ctx.saved_tensors
    gradients = packed_attention_backward(d_out, *given, out, lse, turned, ctx.eps)
    given_gradients = [g if t is not None else None for g, t in zip(gradients, given, strict=False)]
    return (*given_gradients, None, None, None, None)


packed_attention.register_autograd(_gradients, setup_context=_save)


def _config(direction: str, qkv: Tensor) -> dict[str, int]:
    """Tile sizes, warps and stages of one of the kernels."""
    tokens, width = qkv.shape[1], qkv.shape[4]
    shape = {"tokens": tokens, "head": width}
    default = default_config(direction, tokens, width)
    return tuning.lookup(f"attention.{direction}", shape, qkv.dtype, qkv.device, default)


def default_config(direction: str, tokens: int, width: int) -> dict[str, int]:
    """The tiling where nothing was measured: the largest that keeps all of a thread's values in registers."""
    wide = width > 96
    queries, keys, warps, stages = {
        "forward": (64, 64, 4, 2),
        "backward.queries": (64, 64, 4, 2),
        "backward.keys": (64, 64, 8, 2) if wide else (64, 64, 4, 2),
    }[direction]
    return {"queries": queries, "keys": keys, "warps": warps, "stages": stages}


def _dense(given: Given) -> Given:
    """Tensors that the kernels can address: channels without gaps."""
    return Given(*(None if t is None else dense_rows(t) for t in given))


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
