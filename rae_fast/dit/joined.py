"""The modulations of many blocks as one product, where the weights that make them lie side by side in memory.

A trunk's projections are small products of one row a sample, 28 of [B, 1152] x [1152, 6912] in DiTDH-XL: at once they
fill a GPU. Parameters stay separate tensors under their official names; only where they lie changes. A wrapper that
lays them elsewhere (DeepSpeed's flat buffers) ends this, and each block makes its own again.

Shapes: B samples, D width, L blocks, E values of a block's modulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JoinRows(torch.autograd.Function):
    """Tensors that follow one another in memory as one, and its gradient as theirs; neither is copied."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        """[E, ...] of each part to [L E, ...]."""
        ctx.rows = [len(part) for part in parts]
        first = parts[0].detach()
        return first.as_strided((sum(ctx.rows), *first.shape[1:]), first.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """The pieces."""
        return gradient.contiguous().split(ctx.rows)


def lay_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters of equal type and row length into one piece of memory, in order."""
    joined = torch.cat([p.detach() for p in parameters])
    for parameter, piece in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = piece


def lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends, in the same piece of memory."""
    storage, end = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
    for tensor in tensors:
        # ZeRO stage 3 leaves empty tensors, all at one address.
        whole = tensor.numel() > 0 and tensor.is_contiguous()
        if not whole or tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != end:
            return False
        end += tensor.numel() * tensor.element_size()
    return True


def joined_linear(x: Tensor, maps: Sequence[nn.Linear]) -> tuple[Tensor, ...] | None:
    """Results [B, 1, E] of all maps of the same input [B, 1, D] by one product, in the type of the weights.

    None if the maps' weights or biases do not lie side by side.
    """
    weights, biases = [m.weight for m in maps], [m.bias for m in maps]
    if not (lie_side_by_side(weights) and lie_side_by_side(biases)):
        return None
    with torch.autocast(x.device.type, enabled=False):
        weight = JoinRows.apply(*weights)
        return F.linear(x.to(weight.dtype), weight, JoinRows.apply(*biases)).split([len(w) for w in weights], dim=-1)
