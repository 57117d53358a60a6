"""Transformer blocks with adaptive normalization, conditioned per sample or per token.

Everything memory-bound goes through the functions of `Operations`, plain ones here; `fused` has the same by the
project's kernels, and `use_kernels` there chooses for a whole model.

Shapes: B samples, N tokens, D width, H heads, P head width. Modulations are [B, 1, D] (per sample) or [B, N, D] (per
token). Row statistics, modulation and rotation are in float32 or above; what enters a GEMM has its weights' type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_fast.dit.embed import OwnTypeLinear, at_least_fp32, rotate

NORM_EPS = 1e-6
QK_LAYERNORM_EPS = 1e-5
# Rows of 8 sixteen-bit numbers are 16 bytes, the least that aligned loads take; 128 columns are one tile of a GEMM.
ALIGNED_COLUMNS, GEMM_TILE = 8, 128

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or above (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        x = at_least_fp32(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * at_least_fp32(self.weight)


class LayerNorm(nn.LayerNorm):
    """Layer normalization in float32 or above."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        weight = None if self.weight is None else at_least_fp32(self.weight)
        bias = None if self.bias is None else at_least_fp32(self.bias)
        return F.layer_norm(at_least_fp32(x), self.normalized_shape, weight, bias, self.eps)


def block_norm(width: int, use_rmsnorm: bool) -> nn.Module:
    """The norm before a branch: RMSNorm with a weight, or LayerNorm without affine."""
    return RMSNorm(width) if use_rmsnorm else LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)


def head_norm(head_width: int, use_rmsnorm: bool) -> nn.Module:
    """The norm of queries and keys: RMSNorm, or LayerNorm with affine and torch's default eps."""
    return RMSNorm(head_width) if use_rmsnorm else LayerNorm(head_width, eps=QK_LAYERNORM_EPS)


def norm_modulate(x_BND: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """norm(x) (1 + scale) + shift in float32, given out as `dtype`; no shift means zero."""
    h_BND = norm(x_BND) * (1 + at_least_fp32(scale))
    return (h_BND if shift is None else h_BND + shift).to(dtype)


def gated_residual(x_BND: Tensor, branch_BND: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + gate * branch in float32, given out in the type of the residual stream `x`.

    `bias` is what `loose_bias` gives for the branch: none here, where the branch's last map makes its own gradient.
    """
    return (x_BND + at_least_fp32(gate) * branch_BND).to(x_BND.dtype)


def gated_residual_norm_modulate(
    x_BND: Tensor,
    branch_BND: Tensor,
    gate: Tensor,
    norm: nn.Module,
    shift: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch, and what enters the next one: (x', mod(norm(x'))); `bias` as above."""
    x_BND = gated_residual(x_BND, branch_BND, gate, bias)
    return x_BND, norm_modulate(x_BND, norm, shift, scale, dtype)


def packed_attention(
    qkv_BNE: Tensor, num_heads: int, rope: Rope | None, q_norm: nn.Module | None, k_norm: nn.Module | None
) -> Tensor:
    """Softmax attention over all tokens: packed [B, N, 3 H P] -> [B, N, H P].

    Args:
        qkv_BNE: queries, keys and values, each [H, P] for a token, one after the other.
        num_heads: H.
        rope: cosines and sines [N, P] that rotate queries and keys, or None.
        q_norm: normalization of the queries over P, before the rotation, or None.
        k_norm: the same for the keys.
    """
    q, k, v = qkv_BNE.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    if q_norm is not None and k_norm is not None:
        q, k = q_norm(q), k_norm(k)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    out_BHNP = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return out_BHNP.transpose(1, 2).flatten(2)


def attend(attention: Attention, x_BND: Tensor, rope: Rope | None) -> Tensor:
    """Self-attention from normalized tokens to the residual branch, [B, N, D] -> [B, N, D]."""
    qkv_BNE = attention.qkv(x_BND)
    heads_BND = packed_attention(qkv_BNE, attention.num_heads, rope, attention.q_norm, attention.k_norm)
    return attention.proj(heads_BND)


def feed_gated(mlp: SwiGLU, x: Tensor) -> Tensor:
    """The SwiGLU feed-forward, [..., D] -> [..., D]."""
    gate, value = mlp.w12(x).chunk(2, dim=-1)
    return mlp.w3(F.silu(gate) * value)


def loose_bias(branch: nn.Module) -> Tensor | None:
    """The bias of a branch's last linear map if its gradient is to be made by the residual behind it; never here."""
    return None


class Operations(NamedTuple):
    """What a block does beside its linear maps: functions of the signatures above."""

    norm_modulate: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    gated_residual_norm_modulate: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    feed_gated: Callable[..., Tensor]
    loose_bias: Callable[[nn.Module], Tensor | None]


PLAIN = Operations(norm_modulate, gated_residual, gated_residual_norm_modulate, attend, feed_gated, loose_bias)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    operations = PLAIN

    def __init__(self, width: int, num_heads: int, *, use_qknorm: bool, use_rmsnorm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = head_norm(width // num_heads, use_rmsnorm) if use_qknorm else None
        self.k_norm = head_norm(width // num_heads, use_rmsnorm) if use_qknorm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, rope: Rope | None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.operations.attend(self, x_BND, rope)


def padded_width(width: int, x: Tensor) -> int:
    """`width` as it is multiplied: rounded up where an unaligned row length costs time, that is on CUDA."""
    return aligned_width(width) if x.device.type == "cuda" else width


def aligned_width(width: int) -> int:
    """`width`, or whole GEMM tiles if rows of it would not be aligned: 5461 -> 5504."""
    return width if width % ALIGNED_COLUMNS == 0 else -(-width // GEMM_TILE) * GEMM_TILE


class GateValue(nn.Linear):
    """The SwiGLU's input map, gate rows first; each half is zero-padded to whole GEMM tiles on CUDA.

    The head of every released size has 5461 hidden channels, an odd row length for which GEMMs fall back to unaligned
    loads. The padding is made in each pass (microseconds), so parameters and checkpoints keep their official shapes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., 2 * padded hidden]."""
        return F.linear(x, *self.padded(x))

    def padded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias as they are multiplied with `x`."""
        hidden = self.out_features // 2
        padding = padded_width(hidden, x) - hidden
        if padding == 0:
            return self.weight, self.bias
        weight = F.pad(self.weight.unflatten(0, (2, hidden)), (0, 0, 0, padding)).flatten(0, 1)
        return weight, F.pad(self.bias.unflatten(0, (2, hidden)), (0, padding)).flatten()


class PaddedInputLinear(nn.Linear):
    """A linear map that takes inputs with surplus zero channels at their end."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden or more] -> [..., D]."""
        return F.linear(x, self.padded(x.shape[-1]), self.bias)

    def padded(self, width: int) -> Tensor:
        """The weight for inputs of `width` channels."""
        padding = width - self.in_features
        return F.pad(self.weight, (0, padding)) if padding else self.weight


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x) with W1 and W2 in one matrix (Shazeer, arXiv 2002.05202)."""

    operations = PLAIN

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = GateValue(width, 2 * hidden)
        self.w3 = PaddedInputLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.operations.feed_gated(self, x)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1 x)) with the tanh approximation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def feed_forward(width: int, mlp_ratio: float, use_swiglu: bool) -> SwiGLU | GeluMLP:
    """The second branch of a block; a SwiGLU's hidden width is 2/3 of the GELU's, for equal parameters."""
    hidden = int(width * mlp_ratio)
    return SwiGLU(width, int(2 / 3 * hidden)) if use_swiglu else GeluMLP(width, hidden)


def modulation_map(width: int, parts: int, per_token: bool) -> nn.Sequential:
    """SiLU and the linear map from the condition to `parts` modulations; per sample it keeps float32 under autocast."""
    linear = nn.Linear if per_token else OwnTypeLinear
    return nn.Sequential(nn.SiLU(), linear(width, parts * width))


class AdaLNBlock(nn.Module):
    """Attention and feed-forward, each normalized, modulated and gated by the condition (DiT, arXiv 2212.09748).

    x <- x + g1 attn(mod(norm(x), b1, s1)); x <- x + g2 mlp(mod(norm(x), b2, s2))
    """

    operations = PLAIN

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        use_qknorm: bool,
        use_swiglu: bool,
        use_rmsnorm: bool,
        wo_shift: bool,
        per_token: bool = False,
    ) -> None:
        super().__init__()
        self.wo_shift = wo_shift
        self.norm1 = block_norm(width, use_rmsnorm)
        self.norm2 = block_norm(width, use_rmsnorm)
        self.attn = Attention(width, num_heads, use_qknorm=use_qknorm, use_rmsnorm=use_rmsnorm)
        self.mlp = feed_forward(width, mlp_ratio, use_swiglu)
        self.adaLN_modulation = modulation_map(width, 4 if wo_shift else 6, per_token)

    def modulation(self, silu_c: Tensor) -> Tensor:
        """The block's shifts, scales and gates [B, 1 or N, 6 D] from the condition after its SiLU."""
        projection = self.adaLN_modulation[1]
        return projection(silu_c.to(projection.weight.dtype))

    def forward(self, x_BND: Tensor, silu_c: Tensor, rope: Rope | None, modulation: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x_BND: residual stream.
            silu_c: condition [B, 1 or N, D] after the SiLU with which the modulation begins (one for all blocks).
            rope: rotary table of this width, or None.
            modulation: the block's modulation where it was computed outside; else it is computed here.
        """
        modulation = self.modulation(silu_c) if modulation is None else modulation
        if self.wo_shift:
            (scale1, gate1, scale2, gate2), shift1, shift2 = modulation.chunk(4, dim=-1), None, None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        dtype, do = self.attn.qkv.weight.dtype, self.operations
        branch_BND = self.attn(do.norm_modulate(x_BND, self.norm1, shift1, scale1, dtype), rope)
        x_BND, h_BND = do.gated_residual_norm_modulate(
            x_BND, branch_BND, gate1, self.norm2, shift2, scale2, dtype, do.loose_bias(self.attn)
        )
        return do.gated_residual(x_BND, self.mlp(h_BND), gate2, do.loose_bias(self.mlp))

    def reset_parameters(self) -> None:
        """Zero modulation: the block begins as the identity."""
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)


class FinalLayer(nn.Module):
    """Norm, modulation without gate, and the map to the values of one patch."""

    operations = PLAIN

    def __init__(self, width: int, patch_values: int, *, use_rmsnorm: bool, per_token: bool = False) -> None:
        super().__init__()
        self.norm_final = block_norm(width, use_rmsnorm)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = modulation_map(width, 2, per_token)

    def forward(self, x_BND: Tensor, silu_c: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, patch values]."""
        projection = self.adaLN_modulation[1]
        shift, scale = projection(silu_c.to(projection.weight.dtype)).chunk(2, dim=-1)
        dtype = self.linear.weight.dtype
        return self.linear(self.operations.norm_modulate(x_BND, self.norm_final, shift, scale, dtype))

    def reset_parameters(self) -> None:
        """All zero: a new model predicts zero."""
        for module in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
