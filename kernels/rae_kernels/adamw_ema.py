"""AdamW, an exponential moving average and the 16-bit copy in one pass over flat float32 tensors.

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)        (Loshchilov and Hutter, 1711.05101)
    e_k = d_k e_k + (1 - d_k) p, for each decay d_k

In separate operations these read and write every number anew: 36 bytes a parameter here where torch's fused AdamW, a
lerp and a cast move 54.

Shapes: P parameters of this rank's shard, K averages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rae_kernels import tuning
from rae_kernels.launch import use_triton

MOST_AVERAGES = 4
DEFAULT_CONFIG = {"block": 1024, "warps": 4}


def adamw_ema(
    param_P: Tensor,
    grad_P: Tensor,
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    averages: Sequence[Tensor],
    decays: Sequence[float],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copy_P: Tensor | None = None,
) -> None:
    """One step in place, without a host synchronization.

    Args:
        param_P: float32 master parameters.
        grad_P: gradient, any floating type.
        exp_avg_P: first moment m, float32.
        exp_avg_sq_P: second moment v, float32.
        averages: up to four float32 tensors like the parameters, moved towards the new parameters.
        decays: decay of each average.
        step: number of this step, from 1.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root of the second moment.
        weight_decay: wd, decoupled.
        grad_scale: float32 [1], what the gradient is multiplied by (clipping), or None.
        found_inf: float32 [1]; where it is not zero the step changes nothing but the copy, or None.
        copy_P: 16-bit tensor that receives the new parameters, or None.

    Raises:
        ValueError: more averages than four, or another number of decays.
    """
    if len(averages) != len(decays) or len(averages) > MOST_AVERAGES:
        raise ValueError(f"{len(averages)} averages with {len(decays)} decays; at most {MOST_AVERAGES}, one decay each")
    tensors = (param_P, grad_P, exp_avg_P, exp_avg_sq_P, list(averages), copy_P, grad_scale, found_inf)
    step_in_place(*tensors, list(decays), step, lr, *betas, eps, weight_decay)


def reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Sequence[Tensor],
    copy: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decays: Sequence[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The step in plain PyTorch, in place, in the parameters' type."""
    grad = grad.to(param.dtype) if grad_scale is None else grad.to(param.dtype) * grad_scale
    m = exp_avg + (grad - exp_avg) * (1 - beta1)
    v = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    p = param * (1 - lr * weight_decay) - step_size * m / (v.sqrt() / root + eps)
    kept = [(param, p), (exp_avg, m), (exp_avg_sq, v)]
    kept += [(e, e + (p - e) * (1 - d)) for e, d in zip(averages, decays, strict=True)]
    for old, new in kept:
        old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new))
    if copy is not None:
        copy.copy_(param)


@torch.library.custom_op(
    "rae_kernels::adamw_ema",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "averages", "copy"),
    schema="(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)[] averages, "
    "Tensor(e!)? copy, Tensor? grad_scale, Tensor? found_inf, float[] decays, SymInt step, float lr, float beta1, "
    "float beta2, float eps, float weight_decay) -> ()",
)
def step_in_place(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: list[Tensor],
    copy: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    decays: list[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """As `adamw_ema`."""
    tensors = (param, grad, exp_avg, exp_avg_sq, averages, copy, grad_scale, found_inf)
    numbers = (decays, step, lr, beta1, beta2, eps, weight_decay)
    flat = all(t.is_contiguous() for t in (param, grad, exp_avg, exp_avg_sq, *averages))
    if not use_triton(param) or not flat or param.dtype != torch.float32:
        return reference(*tensors, *numbers)
    from rae_kernels.adamw_ema_triton import step_launch

    config = tuning.lookup("adamw_ema", {"averages": len(averages)}, grad.dtype, param.device, DEFAULT_CONFIG)
    step_launch(*tensors, *numbers, config).run()
    return None


@step_in_place.register_fake
def _(*_arguments):
    return None
