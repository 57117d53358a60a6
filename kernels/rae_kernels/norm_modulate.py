"""Gated residual, norm and modulation in one pass over the rows, and its two halves.

    x' = x + gate branch
    y  = norm(x') weight (1 + scale) + shift        (Peebles and Xie, arXiv 2212.09748, adaLN-Zero)

Shapes: B samples, N tokens, C width; x and branch [B, N, C]; modulations [B, 1, C] (per sample) or [B, N, C] (per
token); weight and bias [C]. The residual stream keeps its type (bfloat16 or float32); arithmetic, row statistics and
sums are in float32 or above. No result depends on the order in which programs finish.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rae_kernels import tuning
from rae_kernels.launch import dense_rows, use_triton

# Sums over a program's tokens, in the order of the backward's partials. Modulation per sample: of dy, dy * normed,
# dx' * branch and dx'; per token: the addends of the weight's and of the branch bias's gradient.
SAMPLE_SUMS = ("dy", "dy_normed", "dx_branch", "dx")
TOKEN_SUMS = ("dweight", "dbias")


class Terms(NamedTuple):
    """The tensors of one form of the operation; no branch: norm and modulation only; no scale: residual only."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    weight: Tensor | None = None


def gated_residual_norm_modulate(
    x_BNC: Tensor,
    branch_BNC: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    *,
    eps: float = 1e-6,
    layer_norm: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', y) of the module's equations.

    Args:
        x_BNC: residual stream, float32 or a 16-bit type, which x' keeps.
        branch_BNC: what attention or feed-forward gave.
        gate: [B, 1 or N, C].
        scale: like gate.
        shift: like gate, or None for zero.
        weight_C: the norm's weight, or None for one.
        bias_C: the bias that the branch's last linear map has added, only so that its gradient is made on the way:
            where it is given, that map should use `bias.detach()`.
        eps: added to the mean square.
        layer_norm: subtract the row's mean (LayerNorm), else RMSNorm.
        dtype: type of y; the stream's by default.
    """
    terms = Terms(x_BNC, branch_BNC, gate, bias_C, scale, shift, weight_C)
    x_new, y = _run(terms, eps, layer_norm, dtype)
    return x_new, y


def norm_modulate(
    x_BNC: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight_C: Tensor | None = None,
    *,
    eps: float = 1e-6,
    layer_norm: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y of the module's equations for x' = x; arguments as in `gated_residual_norm_modulate`."""
    return _run(Terms(x_BNC, scale=scale, shift=shift, weight=weight_C), eps, layer_norm, dtype)[1]


def gated_residual(x_BNC: Tensor, branch_BNC: Tensor, gate: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """x' of the module's equations; arguments as in `gated_residual_norm_modulate`."""
    return _run(Terms(x_BNC, branch_BNC, gate, bias_C), 0.0, False, None)[0]


def reference(terms: Terms, eps: float, layer_norm: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The operation in plain PyTorch, (x', y); x itself and an empty y for forms without them."""
    x_new = terms.x
    if terms.branch is not None:
        branch = _wide(terms.branch)
        if terms.bias is not None:
            # Adds nothing to the value, and the column sums of the gradient to the bias's.
            branch = branch + _wide(terms.bias - terms.bias.detach())
        x_new = (_wide(x_new) + _wide(terms.gate) * branch).to(x_new.dtype)
    if terms.scale is None:
        return x_new, _absent(x_new)
    wide = _wide(x_new)
    if layer_norm:
        normed = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    else:
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if terms.weight is not None:
        normed = normed * _wide(terms.weight)
    y = normed * (1 + _wide(terms.scale))
    return x_new, (y if terms.shift is None else y + _wide(terms.shift)).to(dtype)


def reference_backward(
    dx_new: Tensor | None, dy: Tensor | None, terms: Terms, mean: Tensor, rstd: Tensor, layer_norm: bool
) -> tuple[Tensor, ...]:
    """(dx, dbranch, dgate, dbias, dscale, dshift, dweight) written out; `terms.x` is x'."""
    wide = _wide(terms.x)
    dx = torch.zeros_like(wide) if dx_new is None else _wide(dx_new)
    dbranch, dgate, dbias, dscale, dshift, dweight = (_absent(wide) for _ in range(6))
    if terms.scale is not None and dy is not None:
        dy, scale = _wide(dy), 1 + _wide(terms.scale)
        normed = (wide - mean[..., None] if layer_norm else wide) * rstd[..., None]
        weight = wide.new_ones(()) if terms.weight is None else _wide(terms.weight)
        dscale = _like(dy * normed * weight, terms.scale)
        dshift = dshift if terms.shift is None else _like(dy, terms.shift)
        dweight = dweight if terms.weight is None else (dy * scale * normed).sum((0, 1)).to(terms.weight.dtype)
        d_normed = dy * scale * weight
        along = (d_normed * normed).mean(-1, keepdim=True)
        across = d_normed.mean(-1, keepdim=True) if layer_norm else 0.0
        dx = dx + rstd[..., None] * (d_normed - normed * along - across)
    if terms.branch is not None:
        wide_dbranch = dx * _wide(terms.gate)
        dbranch, dgate = wide_dbranch.to(terms.branch.dtype), _like(dx * _wide(terms.branch), terms.gate)
        dbias = dbias if terms.bias is None else wide_dbranch.sum((0, 1)).to(terms.bias.dtype)
    dx = _absent(wide) if terms.scale is None else dx.to(terms.x.dtype)
    return dx, dbranch, dgate, dbias, dscale, dshift, dweight


def _run(terms: Terms, eps: float, layer_norm: bool, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The registered operation on CUDA (and in the interpreter), the reference elsewhere."""
    dtype = dtype or terms.x.dtype
    if not use_triton(terms.x):
        return reference(terms, eps, layer_norm, dtype)
    samples, tokens = terms.x.shape[:2]
    modulations = {"gate": terms.gate, "scale": terms.scale, "shift": terms.shift}
    rows = max(m.shape[1] for m in modulations.values() if m is not None)
    if rows not in (1, tokens):
        raise ValueError(f"modulation of {rows} tokens for rows of {tokens} tokens; expected 1 or {tokens}")
    expanded = {k: None if m is None else m.expand(samples, rows, -1) for k, m in modulations.items()}
    x_new, y, _, _ = residual_norm_modulate(*terms._replace(**expanded), eps, layer_norm, dtype)
    return x_new, y


@torch.library.custom_op(
    "rae_kernels::residual_norm_modulate",
    mutates_args=(),
    schema="(Tensor x, Tensor? branch, Tensor? gate, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? weight, "
    "float eps, bool layer_norm, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
)
def residual_norm_modulate(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
    layer_norm: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', y, mean [B, N], rstd [B, N]); empty where this form has none: x' without branch, mean without LayerNorm."""
    terms = _dense(Terms(x, branch, gate, bias, scale, shift, weight))
    if use_triton(x):
        from rae_kernels.norm_modulate_triton import forward_launch

        launch, outputs = forward_launch(terms, eps, layer_norm, dtype, _config("forward", x, gate, scale))
        launch.run()
        return outputs
    x_new, y = reference(terms, eps, layer_norm, dtype)
    wide = _wide(x_new)
    mean, rstd = _absent(wide), _absent(wide)
    if scale is not None:
        square = wide.var(-1, correction=0) if layer_norm else wide.square().mean(-1)
        mean, rstd = wide.mean(-1) if layer_norm else mean, torch.rsqrt(square + eps)
    return _absent(x) if branch is None else x_new, y, mean, rstd


@residual_norm_modulate.register_fake
def _(x, branch, gate, bias, scale, shift, weight, eps, layer_norm, dtype):
    wide = _wide(x)
    return (
        _absent(x) if branch is None else x.new_empty(x.shape),
        _absent(x) if scale is None else x.new_empty(x.shape, dtype=dtype),
        wide.new_empty(x.shape[:2]) if scale is not None and layer_norm else _absent(wide),
        _absent(wide) if scale is None else wide.new_empty(x.shape[:2]),
    )


@torch.library.custom_op(
    "rae_kernels::residual_norm_modulate_backward",
    mutates_args=(),
    schema="(Tensor? dx_new, Tensor? dy, Tensor x, Tensor? branch, Tensor? gate, Tensor? bias, Tensor? scale, "
    "Tensor? shift, Tensor? weight, Tensor mean, Tensor rstd, bool layer_norm) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def residual_norm_modulate_backward(
    dx_new: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    layer_norm: bool,
) -> tuple[Tensor, ...]:
    """(dx, dbranch, dgate, dbias, dscale, dshift, dweight) for x = x'; empty where the form lacks the input."""
    terms = _dense(Terms(x, branch, gate, bias, scale, shift, weight))
    dx_new = None if dx_new is None else dense_rows(dx_new)
    dy = None if dy is None else dense_rows(dy)
    if not use_triton(x):
        return reference_backward(dx_new, dy, terms, mean, rstd, layer_norm)
    from rae_kernels.norm_modulate_triton import backward_launch

    launch, outputs = backward_launch(dx_new, dy, terms, mean, rstd, layer_norm, _config("backward", x, gate, scale))
    launch.run()
    return _finish(terms, *outputs)


@residual_norm_modulate_backward.register_fake
def _(dx_new, dy, x, branch, gate, bias, scale, shift, weight, mean, rstd, layer_norm):
    def like(tensor: Tensor | None, shape: torch.Size | None = None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(shape or tensor.shape)

    dx = like(None if scale is None else x)
    return dx, like(branch), like(gate), like(bias), like(scale), like(shift), like(weight)


def _finish(
    terms: Terms, dx: Tensor, dbranch: Tensor, dgate: Tensor, dscale: Tensor, dshift: Tensor, partials: Tensor
) -> tuple[Tensor, ...]:
    """The backward's outputs from the kernel's: partials are added up in the order in which they lie."""
    if not is_per_token(terms):
        from rae_kernels.norm_modulate_triton import finish_launch

        launch, (dgate, dscale, dshift, partials) = finish_launch(terms, partials)
        launch.run()
    sums = partials.sum(0)
    dweight, dbias = (
        _absent(sums) if tensor is None else total.to(tensor.dtype, copy=True)
        for tensor, total in ((terms.weight, sums[0]), (terms.bias, sums[1]))
    )
    return dx, dbranch, dgate, dbias, dscale, dshift, dweight


def is_per_token(terms: Terms) -> bool:
    """Whether modulations are of each token, else of each sample."""
    return any(m is not None and m.shape[1] > 1 for m in (terms.gate, terms.scale))


def _save(ctx, inputs, output) -> None:
    x, branch, gate, bias, scale, shift, weight, _, layer_norm, _ = inputs
    x_new, _, mean, rstd = output
    ctx.save_for_backward(x if branch is None else x_new, branch, gate, bias, scale, shift, weight, mean, rstd)
    ctx.layer_norm = layer_norm
    ctx.set_materialize_grads(False)


def _gradients(ctx, dx_new, dy, _mean, _rstd):
    *tensors, mean, rstd = ctx.saved_tensors
    terms = Terms(*tensors)
    if terms.scale is not None and dy is None:
        dy = torch.zeros_like(terms.x)
    if terms.branch is None:
        dx_new = None
    elif dx_new is None and terms.scale is None:
        dx_new = torch.zeros_like(terms.x)
    gradients = residual_norm_modulate_backward(dx_new, dy, *terms, mean, rstd, ctx.layer_norm)
    dx = dx_new if terms.scale is None else gradients[0]
    given = [dx, *(g if t is not None else None for g, t in zip(gradients[1:], terms[1:], strict=True))]
    return (*given, None, None, None)


residual_norm_modulate.register_autograd(_gradients, setup_context=_save)


def _config(direction: str, x: Tensor, gate: Tensor | None, scale: Tensor | None) -> dict[str, int]:
    """Rows and warps of a program."""
    tokens, width = x.shape[1:]
    per_token = is_per_token(Terms(x, gate=gate, scale=scale))
    return tuning.lookup(
        f"norm_modulate.{direction}",
        {"tokens": tokens, "width": width, "per_token": per_token},
        x.dtype,
        x.device,
        default_config(direction, tokens, width),
    )


def default_config(direction: str, tokens: int, width: int) -> dict[str, int]:
    """Rows and warps where nothing was measured: eight columns a lane, and few partial sums."""
    warps = min(8, max(1, 1 << (max(1, width // 256) - 1).bit_length()))
    return {"rows": min(tokens, 8 if direction == "forward" else 64), "warps": warps}


def _dense(terms: Terms) -> Terms:
    """Terms whose rows lie without gaps."""
    return Terms(*(None if t is None else dense_rows(t) for t in terms))


def _absent(like: Tensor) -> Tensor:
    """What stands for an output that this form does not have; a new one each time, as outputs must not be the same."""
    return like.new_empty(0)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _like(full_BNC: Tensor, modulation: Tensor) -> Tensor:
    """A per-token gradient summed to the modulation's shape, in its type, as a tensor of its own."""
    summed = full_BNC.sum(1, keepdim=True) if modulation.shape[1] == 1 else full_BNC
    return summed.to(modulation.dtype, copy=True)
