"""Trains one module on XLA devices: the face of `training.engine.Engine`, one graph for each kind of micro-step.

What changes from step to step (learning rate, EMA weight, step count) enters the graph as data, so that the first
steps compile everything there is to compile. Nothing is read back from the device in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rae_fast.config import Optimizer, Runtime
from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.training.ema import FlatEMA
from rae_fast.training.engine import RECORD, Engine
from rae_fast.training.optimizers import build_optimizer
from rae_fast.training.shards import Segment
from rae_fast.xla.device import sync
from rae_fast.xla.spmd import DeviceMesh


class WholeParameters:
    """Parameters held whole by every rank; flat copies are made when asked for, as XLA tensors have no storage.

    The face of `training.shards.Shards`.
    """

    replicated = True

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shapes = {n: tuple(p.shape) for n, p in self.parameters.items()}
        self.segments = [Segment(n, 0, p.numel(), i, 0) for i, (n, p) in enumerate(self.parameters.items())]

    @property
    def masters(self) -> list[Tensor]:
        """Flat copies, in the module's order."""
        return [p.detach().reshape(-1) for p in self.parameters.values()]

    def gradients(self) -> list[Tensor]:
        """Flat gradients, in the module's order; zeros where a parameter took no part."""
        return [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters.values()]

    @torch.no_grad()
    def write(self, flats: Sequence[Tensor]) -> None:
        """Flat tensors back into the parameters."""
        for parameter, flat in zip(self.parameters.values(), flats, strict=True):
            parameter.copy_(flat.view_as(parameter))


class XlaEngine(Engine):
    """As `Engine`, on an XLA device; arguments as there, without DeepSpeed.

    With several processes gradients are averaged by the runtime's own all-reduce where the runtime knows all of them
    (TPU), and otherwise over the host.

    Args:
        mesh: all devices of this process, over which weights, moments, averages and batches are cut; None: one device.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: Optimizer,
        lr: Callable[[int], float],
        ranks: Ranks,
        device: torch.device,
        runtime: Runtime | None = None,
        accumulation: int = 1,
        clip_grad: float | None = None,
        ema_decays: Sequence[float | str] = (),
        mesh: DeviceMesh | None = None,
    ) -> None:
        if optimizer.type.casefold() != "adamw":
            raise UserError(f"optimizer.type: {optimizer.type} with runtime.device xla", "adamw")
        self._begin(module, runtime or Runtime(precision="fp32"), ranks, device, lr, accumulation, clip_grad)
        self.settings, self.mesh = optimizer, mesh
        self.optimizer_type, self.zero_stage = "adamw", 0
        # Before the module moves: on an XLA device its parameters are other objects.
        groups = build_optimizer(module, optimizer).param_groups
        decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        self._decays = [decay_of[id(p)] for p in module.parameters() if p.requires_grad]
        self.module, self._ddp, self._deepspeed = module.to(device), None, None
        self.shards = WholeParameters(module)
        if mesh is not None:
            mesh.cut_weights(self.shards.parameters.values())
        self._moments = [(torch.zeros_like(flat), torch.zeros_like(flat)) for flat in self.shards.masters]
        self._made = torch.zeros((), dtype=torch.float32, device=device)  # optimizer steps that changed something
        self._flats: list[Tensor] = []
        self.ema = FlatEMA(self.shards.masters, ema_decays)
        if mesh is not None:
            mesh.cut_weights([t for pair in self._moments for t in pair])
            mesh.cut_weights([t for label in self.ema.labels for t in self.ema.shards(label)])
        sync()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass, ready for `backward`."""
        if self.mesh is not None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.ndim:
                    self.mesh.cut_batch(value)
        with self.autocast():
            return self.module(*args, **kwargs)

    def step(self) -> bool:
        """As `Engine.step`; ends the graph of the micro-step."""
        boundary = self.at_boundary
        self._micro_steps += 1
        if boundary:
            self._update()
            self.steps += 1
        sync()
        return boundary

    @torch.no_grad()
    def _update(self) -> None:
        gradients = self.shards.gradients()
        figures = [self._loss / self.ranks.world, torch.full_like(self._loss, float(self.stop_requested))]
        observed = self._observed if self._observed is not None else self._loss.new_zeros(0)
        figures, gradients = self._over_ranks(torch.cat([torch.stack(figures), observed]), gradients)
        loss, stop = figures[:2].unbind()
        norm = torch.stack([g.float().square().sum() for g in gradients]).sum().double().sqrt()
        bad = ~(loss + norm).isfinite()
        self.record = torch.cat([torch.stack([loss, norm, bad.double(), stop]), figures[2:]])
        assert len(self.record) == len(RECORD) + len(observed)
        self.lr = self.lr_at(self.steps)
        self._adamw(gradients, norm, bad)
        self.ema.update(self.shards.masters, keep=1 - bad.float(), step=self.steps + 1)
        self.module.zero_grad(set_to_none=True)
        self._loss = torch.zeros_like(self._loss)
        self._observed = None

    def _over_ranks(self, figures: Tensor, gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Sums of figures and means of gradients over all ranks."""
        world = self.ranks.world
        if world == 1:
            return figures, gradients
        import torch_xla.core.xla_model as xm
        import torch_xla.runtime as xr

        if xr.world_size() == world:
            figures = xm.all_reduce(xm.REDUCE_SUM, figures)
            return figures, xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1 / world) or gradients
        host = torch.cat([figures.float(), *gradients]).cpu()
        dist.all_reduce(host)
        pieces = host.to(self.device).split([len(figures), *map(len, gradients)])
        return pieces[0].to(figures.dtype), [piece / world for piece in pieces[1:]]

    def _adamw(self, gradients: Sequence[Tensor], norm: Tensor, bad: Tensor) -> None:
        """One step of AdamW (Loshchilov and Hutter, 1711.05101), its gradient clipped; nothing moves where `bad`.

        m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
        p = p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
        """
        beta1, beta2 = self.settings.betas
        scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0).float() if self.clip_grad else 1.0
        lr = torch.tensor([self.lr], dtype=torch.float32).to(self.device)
        step = self._made + 1
        size, root = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
        updated = []
        masters = self.shards.masters
        for p, g, (m, v), decay in zip(masters, gradients, self._moments, self._decays, strict=True):
            g = g.float() * scale
            new_m, new_v = m + (g - m) * (1 - beta1), v * beta2 + g * g * (1 - beta2)
            new_p = p * (1 - lr * decay) - size * new_m / (new_v.sqrt() / root + self.settings.eps)
            m.copy_(torch.where(bad, m, new_m))
            v.copy_(torch.where(bad, v, new_v))
            updated.append(torch.where(bad, p, new_p))
        self.shards.write(updated)
        self._made.copy_(torch.where(bad, self._made, step))

    # --- state ------------------------------------------------------------------------------------------------------

    def _state_dict(self, flats: Sequence[Tensor], keep: bool) -> dict[str, Tensor]:
        return super()._state_dict([flat.cpu() for flat in flats], keep)

    def flat_state(self) -> dict[str, list[Tensor]]:
        """As `Engine.flat_state`; what is written into `master` reaches the weights with `restore`."""
        self._flats = self.shards.masters
        found = {"master": self._flats}
        found["exp_avg"], found["exp_avg_sq"] = (list(kind) for kind in zip(*self._moments, strict=True))
        for label in self.ema.labels:
            found[f"ema/{label}"] = self.ema.shards(label)
        sync()
        return found

    def scalar_state(self) -> dict[str, float]:
        """As `Engine.scalar_state`."""
        return {"steps": self.steps, "optimizer_steps": float(self._made)}

    @torch.no_grad()
    def restore(self, scalars: dict[str, float], fixed: dict[str, Tensor]) -> None:
        """As `Engine.restore`."""
        self.steps, self._micro_steps = int(scalars["steps"]), 0
        self._made = torch.tensor(scalars["optimizer_steps"], dtype=torch.float32).to(self.device)
        self.shards.write(self._flats)
        tensors = {**dict(self.module.named_buffers()), **dict(self.module.named_parameters())}
        for name, value in fixed.items():
            tensors[name].copy_(value)
            if name in self._frozen:
                self._frozen[name] = value.cpu().clone()
        sync()

    def close(self) -> None:
        """Nothing to give back."""


def announce(runtime: Runtime, deepspeed: Any, ranks: Ranks) -> None:
    """Say once which settings an XLA device has no use for."""
    unused = [
        name
        for name, used in (
            ("runtime.kernels: triton", runtime.kernels == "triton"),
            ("runtime.compile (XLA compiles everything)", runtime.compile),
            ("deepspeed", deepspeed is not None),
        )
        if used
    ]
    if unused and ranks.is_main:
        print(f"runtime.device xla: {', '.join(unused)} has no effect here", flush=True)
