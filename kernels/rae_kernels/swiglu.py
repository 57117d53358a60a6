"""SwiGLU's gate and the linear map behind it, with a backward pass that reads the gate's input once.

    h = silu(a) b, [a | b] = x12;    silu(a) = a sigmoid(a)        (Shazeer, arXiv 2002.05202)
    db = dh silu(a), da = dh b sigmoid(a) (1 + a (1 - sigmoid(a)))

Shapes: R rows, F hidden channels; x12 [..., 2 F], gate first, with its bias already added; h [..., F].

A compiler reads dx12 once more for the sum over rows that the bias needs, and may keep h, a seventh of a block's
activations, as the next linear map's weight gradient needs it: here one pass makes dx12, its column sums, and h anew.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rae_kernels import tuning
from rae_kernels.launch import use_triton


def swiglu_linear(x12: Tensor, bias: Tensor | None, weight: Tensor, weight_bias: Tensor | None = None) -> Tensor:
    """silu(a) b, then a linear map, keeping nothing but x12 for the backward pass.

    Args:
        x12: [..., 2 F], bias already added.
        bias: that bias [2 F], only so that its gradient is made on the way: where it is given, the map before should
            use `bias.detach()`.
        weight: [C, F] of the linear map.
        weight_bias: [C], or None.
    """
    if torch.is_autocast_enabled(x12.device.type):
        dtype = torch.get_autocast_dtype(x12.device.type)
        x12, weight = x12.to(dtype), weight.to(dtype)
        weight_bias = None if weight_bias is None else weight_bias.to(dtype)
    if not use_triton(x12):
        return F.linear(reference(x12, bias), weight, weight_bias)
    return gated_linear(x12, bias, weight, weight_bias)


def reference(x12: Tensor, bias: Tensor | None = None) -> Tensor:
    """h in plain PyTorch, in float32 or above inside."""
    wide = _wide(x12)
    if bias is not None:
        # Adds nothing to the value, and the column sums of the gradient to the bias's.
        wide = wide + _wide(bias - bias.detach())
    gate, value = wide.chunk(2, -1)
    return (F.silu(gate) * value).to(x12.dtype)


@torch.library.custom_op(
    "rae_kernels::swiglu_linear",
    mutates_args=(),
    schema="(Tensor x12, Tensor? bias, Tensor weight, Tensor? weight_bias) -> Tensor",
)
def gated_linear(x12: Tensor, bias: Tensor | None, weight: Tensor, weight_bias: Tensor | None) -> Tensor:
    """silu(a) b W^T + w [..., C]."""
    if not use_triton(x12):
        return F.linear(reference(x12), weight, weight_bias)
    from rae_kernels.swiglu_triton import forward_launch

    launch, h = forward_launch(x12.contiguous(), _config("forward", x12))
    launch.run()
    return F.linear(h, weight, weight_bias)


@gated_linear.register_fake
def _(x12, bias, weight, weight_bias):
    return x12.new_empty(*x12.shape[:-1], weight.shape[0])


@torch.library.custom_op(
    "rae_kernels::swiglu_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor x12, Tensor? bias) -> (Tensor, Tensor, Tensor)",
)
def swiglu_backward(dh: Tensor, x12: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dx12 [..., 2 F], h [..., F], dbias [2 F], empty without bias)."""
    dh, x12 = dh.contiguous(), x12.contiguous()
    if not use_triton(x12):
        return _reference_backward(dh, x12, bias)
    from rae_kernels.swiglu_triton import backward_launch

    launch, (dx12, h, partials) = backward_launch(dh, x12, bias is not None, _config("backward", x12))
    launch.run()
    return dx12, h, x12.new_empty(0) if bias is None else partials.sum(0).to(bias.dtype)


@swiglu_backward.register_fake
def _(dh, x12, bias):
    return x12.new_empty(x12.shape), dh.new_empty(dh.shape), x12.new_empty(0 if bias is None else bias.shape)


def _reference_backward(dh: Tensor, x12: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gate, value = _wide(x12).chunk(2, -1)
    wide, sigmoid = _wide(dh), torch.sigmoid(gate)
    d_gate = wide * value * sigmoid * (1 + gate * (1 - sigmoid))
    dx12 = torch.cat([d_gate, wide * gate * sigmoid], -1)
    dbias = x12.new_empty(0) if bias is None else dx12.flatten(0, -2).sum(0).to(bias.dtype)
    return dx12.to(x12.dtype), (gate * sigmoid * value).to(dh.dtype), dbias


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_out):
    x12, bias, weight, _ = ctx.saved_tensors
    dx12, h, dbias = swiglu_backward(d_out @ weight, x12, bias)
    flat = d_out.flatten(0, -2)
    d_weight = flat.mT @ h.flatten(0, -2)
    d_weight_bias = flat.sum(0) if ctx.needs_input_grad[3] else None
    return dx12, None if bias is None else dbias, d_weight, d_weight_bias


gated_linear.register_autograd(_gradients, setup_context=_save)


def _config(direction: str, x12: Tensor) -> dict[str, int]:
    """Rows and columns of a program, and its warps."""
    shape, default = {"hidden": x12.shape[-1] // 2}, default_config(direction)
    return tuning.lookup(f"swiglu.{direction}", shape, x12.dtype, x12.device, default)


def default_config(direction: str) -> dict[str, int]:
    """The choice where nothing was measured: backward, one sum is written for each 64 rows that are read."""
    return {"rows": 1 if direction == "forward" else 64, "columns": 1024, "warps": 4}


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
