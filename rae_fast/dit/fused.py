"""The blocks' operations by the project's kernels: the same functions as the plain ones in `blocks`.

On a machine without CUDA the kernels are their own plain references, so a model computes the same either way. A
parameter that ZeRO stage 3 keeps in pieces is whole only inside its own module: there the plain function runs.

Shapes: as in `blocks`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rae_kernels import attention as attention_kernel
from rae_kernels import norm_modulate as norm_kernel
from rae_kernels import swiglu as swiglu_kernel
from rae_kernels.attention import Given
from rae_kernels.launches import Maker, Stack
from rae_kernels.tuner import ensure_tuned
from torch import Tensor, nn

from rae_fast.dit import blocks
from rae_fast.dit.blocks import (
    PLAIN,
    AdaLNBlock,
    Attention,
    FinalLayer,
    Operations,
    RMSNorm,
    Rope,
    SwiGLU,
    aligned_width,
)
from rae_fast.dit.embed import OwnTypeLinear

TORCH, TRITON = "torch", "triton"
# Enough rows to fill any GPU; more would only take memory while configurations are timed.
TUNING_ROWS = 65536


def use_kernels(model: nn.Module, kernels: str) -> None:
    """Let all blocks of a model run the project's kernels ("triton") or plain PyTorch ("torch")."""
    operations = {TORCH: PLAIN, TRITON: FUSED}[kernels]
    for module in model.modules():
        if isinstance(module, AdaLNBlock | Attention | FinalLayer | SwiGLU):
            module.operations = operations


def prepare_kernels(model: nn.Module, samples: int, dtype: torch.dtype, device: torch.device) -> None:
    """Choose the fastest configuration of every kernel that a model on this GPU will start, the same on all ranks.

    Where neither the committed table nor this machine's cache has it, rank 0 measures it, once: a minute or so. All
    ranks must call this together.

    Args:
        model: with its kernels chosen already; nothing is done for plain PyTorch.
        samples: of a micro-batch.
        dtype: in which linear maps compute; nothing is done for float32, which the kernels are not for.
        device: where the model will run; nothing is done for a CPU.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return
    found, tokens = stacks(model, dtype), model.grid**2
    if found:
        ensure_tuned(found, Maker(str(device), min(samples, max(1, TUNING_ROWS // tokens)), tokens, dtype))


def stacks(model: nn.Module, dtype: torch.dtype) -> list[Stack]:
    """The widths of blocks that run the project's kernels, as the tuner describes them."""
    found = []
    for block in model.modules():
        if isinstance(block, AdaLNBlock) and block.operations is FUSED:
            width, per_token = block.attn.qkv.in_features, not isinstance(block.adaLN_modulation[1], OwnTypeLinear)
            hidden = block.mlp.w3.in_features if isinstance(block.mlp, SwiGLU) else 0
            # What is modulated per token is DiTDH's head, whose stream has the type of its products.
            stream = dtype if per_token else torch.float32
            found.append(Stack(width, block.attn.num_heads, aligned_width(hidden), per_token, stream))
    return list(dict.fromkeys(found))


def norm_modulate(x_BND: Tensor, norm: nn.Module, shift: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As in `blocks`."""
    if _in_pieces(norm):
        return blocks.norm_modulate(x_BND, norm, shift, scale, dtype)
    dtype, layer_norm = _gemm_dtype(x_BND, dtype), isinstance(norm, nn.LayerNorm)
    return norm_kernel.norm_modulate(x_BND, scale, shift, norm.weight, eps=norm.eps, layer_norm=layer_norm, dtype=dtype)


def gated_residual(x_BND: Tensor, branch_BND: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """As in `blocks`."""
    return norm_kernel.gated_residual(x_BND, branch_BND, gate, bias)


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
    """As in `blocks`."""
    if _in_pieces(norm):
        return blocks.gated_residual_norm_modulate(x_BND, branch_BND, gate, norm, shift, scale, dtype)
    return norm_kernel.gated_residual_norm_modulate(
        x_BND,
        branch_BND,
        gate,
        scale,
        shift,
        norm.weight,
        bias,
        eps=norm.eps,
        layer_norm=isinstance(norm, nn.LayerNorm),
        dtype=_gemm_dtype(x_BND, dtype),
    )


def loose_bias(branch: nn.Module) -> Tensor | None:
    """The bias that `attend` and `feed_gated` add without a gradient; whole parameters only."""
    if _in_pieces(branch) or not isinstance(branch, Attention | SwiGLU):
        return None
    return (branch.proj if isinstance(branch, Attention) else branch.w3).bias


def attend(attention: Attention, x_BND: Tensor, rope: Rope | None) -> Tensor:
    """As in `blocks`, where a kernel is the faster one."""
    if _in_pieces(attention):
        return blocks.attend(attention, x_BND, rope)
    return F.linear(_heads(attention, x_BND, rope), attention.proj.weight, attention.proj.bias.detach())


def _heads(attention: Attention, x_BND: Tensor, rope: Rope | None) -> Tensor:
    """What enters the attention's last map, [B, N, D]."""
    dtype, q_norm, k_norm = _gemm_dtype(x_BND, attention.qkv.weight.dtype), attention.q_norm, attention.k_norm
    tokens, width = x_BND.shape[1], x_BND.shape[2] // attention.num_heads
    chosen = attention_kernel.chosen(tokens, width, dtype, x_BND.device)
    if chosen != attention_kernel.TRITON or isinstance(q_norm, nn.LayerNorm):
        return blocks.packed_attention(attention.qkv(x_BND), attention.num_heads, rope, q_norm, k_norm)
    # The kernel makes the bias's gradient, the sum over all rows, while it writes the one of the projection.
    qkv_BNE = F.linear(x_BND, attention.qkv.weight, attention.qkv.bias.detach())
    # Cosine and sine are the same for both channels of a pair.
    cos, sin = (None, None) if rope is None else (table[:, ::2].contiguous() for table in rope)
    given = Given(
        qkv_BNE.unflatten(-1, (3, attention.num_heads, width)),
        attention.qkv.bias,
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        cos,
        sin,
    )
    eps = q_norm.eps if isinstance(q_norm, RMSNorm) else blocks.NORM_EPS
    return attention_kernel.attention(given, eps, attention_kernel.TRITON)


def feed_gated(mlp: SwiGLU, x: Tensor) -> Tensor:
    """As in `blocks`."""
    if _in_pieces(mlp):
        return blocks.feed_gated(mlp, x)
    weight, bias = mlp.w12.padded(x)
    x12 = F.linear(x, weight, bias.detach())
    return swiglu_kernel.swiglu_linear(x12, bias, mlp.w3.padded(x12.shape[-1] // 2), mlp.w3.bias.detach())


FUSED = Operations(norm_modulate, gated_residual, gated_residual_norm_modulate, attend, feed_gated, loose_bias)


def _gemm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type in which a linear map with weights of `dtype` will multiply."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def _in_pieces(module: nn.Module) -> bool:
    """Whether ZeRO stage 3 keeps any of the module's parameters elsewhere between its own forward passes."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
