"""AdamW, and Muon for the matrices of blocks, as the engine wants them: both skip and scale a step on the device.

The engine sets two tensors before `step`: `grad_scale`, by which gradients are divided (clipping), and `found_inf`,
where 1 leaves parameters and states as they are. torch's fused AdamW knows both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.config import Optimizer
from rae_fast.errors import UserError, nearest

TYPES = ("adamw", "muon")


def build_optimizer(
    module: nn.Module, settings: Optimizer, *, whole_parameters: bool = True
) -> torch.optim.AdamW | MuonAndAdamW:
    """The optimizer of a config over a module's trainable parameters.

    Args:
        module: with at least one trainable parameter.
        settings: the `optimizer` section.
        whole_parameters: every rank steps whole parameters, not pieces of them as under ZeRO.

    Raises:
        UserError: nothing is trainable, an unknown type, or Muon on pieces or without a matrix to step.
    """
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError(f"{type(module).__name__} has no trainable parameter", "at least one")
    kind = settings.type.casefold()
    if kind not in TYPES:
        raise UserError(f"optimizer.type: {settings.type!r}{nearest(kind, TYPES)}", f"one of {', '.join(TYPES)}")
    if kind == "adamw":
        return build_adamw(module, trainable, settings)
    if not whole_parameters:
        raise UserError(
            "optimizer.type: muon with runtime.engine=deepspeed",
            "runtime.engine=ddp: Muon orthogonalizes whole matrices, and ZeRO cuts them wherever a shard ends",
            "set runtime.engine=ddp, or optimizer.type: adamw",
        )
    matrices = block_matrices(module)
    if not matrices:
        raise UserError(f"optimizer.type: muon, but {type(module).__name__} has no matrix in a block", "adamw")
    rest = {name: p for name, p in trainable.items() if name not in matrices}
    return MuonAndAdamW(list(matrices.values()), build_adamw(module, rest, settings), settings)


def build_adamw(module: nn.Module, parameters: dict[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW.

    With `decay_norms_and_biases: false`, parameters of fewer than two dimensions and embeddings form a group without
    weight decay.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters.values()), "weight_decay": settings.weight_decay}]
    if settings.weight_decay and not settings.decay_norms_and_biases:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        spared = {n for n, p in parameters.items() if p.ndim < 2 or id(p) in embeddings}
        groups = [
            {"params": [p for n, p in parameters.items() if n not in spared], "weight_decay": settings.weight_decay},
            {"params": [p for n, p in parameters.items() if n in spared], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True)


def block_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable weights of linear layers inside `nn.ModuleList`s: hidden layers, neither input, output nor table."""
    found = {}
    for path, container in module.named_modules():
        if isinstance(container, nn.ModuleList):
            for name, layer in container.named_modules():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    found[f"{path}.{name}.weight"] = layer.weight
    return found


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) on matrices, AdamW on everything else, with one learning rate and weight decay.

    Updates of matrices are scaled to the size of AdamW's (Liu et al., "Muon is scalable for LLM training", 2025,
    eq. 4), so a recipe's learning rate stays what it was. Momentum is kept as `exp_avg`; there is no `exp_avg_sq`.

    Args:
        matrices: two-dimensional parameters.
        adamw: over the others.
        settings: lr, weight_decay, momentum.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], adamw: torch.optim.AdamW, settings: Optimizer) -> None:
        # One optimizer a matrix: what a skipped step must put back is then one matrix at a time.
        self.muons = [
            torch.optim.Muon(
                [matrix],
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            for matrix in matrices
        ]
        self.adamw = adamw
        self.param_groups = [group for one in (*self.muons, adamw) for group in one.param_groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    def prepare_states(self) -> None:
        """Allocate all states as the first step would."""
        for one in self.muons:
            (matrix,) = one.param_groups[0]["params"]
            momentum = torch.zeros_like(matrix, memory_format=torch.preserve_format)
            one.state[matrix] = {"momentum_buffer": momentum}
            empty = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
            steps = torch.zeros((), dtype=torch.float32, device=matrix.device)
            self.state[matrix] = {"step": steps, "exp_avg": momentum, "exp_avg_sq": empty}
        keys = [p for group in self.adamw.param_groups for p in group["params"]]
        prepare_states(self.adamw, keys)
        self.state.update({key: self.adamw.state[key] for key in keys})

    @torch.no_grad()
    def step(self) -> None:
        """One step of both; nothing is read on the host."""
        assert self.grad_scale is not None and self.found_inf is not None
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()
        for one in self.muons:
            (matrix,) = one.param_groups[0]["params"]
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            before = matrix.clone(), state["exp_avg"].clone()
            matrix.grad.div_(self.grad_scale)
            one.step()
            for now, then in zip((matrix, state["exp_avg"]), before, strict=True):
                now.copy_(torch.where(self.found_inf > 0, then, now))
            state["step"] += 1 - self.found_inf

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for one in (*self.muons, self.adamw):
            one.zero_grad(set_to_none=set_to_none)


def prepare_states(optimizer: torch.optim.AdamW | MuonAndAdamW, keys: Sequence[Tensor]) -> None:
    """Allocate states as the first step would, so that a checkpoint can be written or read before it."""
    if isinstance(optimizer, MuonAndAdamW):
        optimizer.prepare_states()
        return
    for key in keys:
        optimizer.state[key] = {
            "step": torch.zeros((), dtype=torch.float32, device=key.device),
            "exp_avg": torch.zeros_like(key, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(key, memory_format=torch.preserve_format),
        }
