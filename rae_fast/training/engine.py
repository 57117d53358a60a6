"""One trained module: forward, backward, step, under DeepSpeed (ZeRO 0-3) or DDP, with EMA and a non-finite guard.

    engine = Engine(module, optimizer=config.training.optimizer, lr=build_schedule(config), ranks=ranks, device=device)
    loss = objective(engine, batch)         # engine(...) is the module's forward under the run's precision
    engine.backward(loss)                   # loss is the mean over the micro-batch
    if engine.step():                       # after every backward; True when the optimizer stepped
        monitor.record(engine.record)       # device tensor: nothing in a step waits for the device

Precision: parameters and optimizer states are float32. `bf16` runs the forward pass under autocast; a DeepSpeed config
with `bf16.enabled` keeps bfloat16 parameters and float32 masters in ZeRO's shards instead.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rae_fast.config import Optimizer, Runtime
from rae_fast.dit.blocks import FinalLayer
from rae_fast.runtime import Ranks, set_precision
from rae_fast.training.deepspeed_setup import check_precision, initialize, read_deepspeed_config, zero_stage
from rae_fast.training.ema import FlatEMA
from rae_fast.training.optimizers import build_optimizer, prepare_states
from rae_fast.training.shards import BUCKET, PlainShards, Shards, Zero3Shards, ZeroShards, gather

# What `Engine.record` holds, in this order; whatever `observe` was given comes behind.
RECORD = ("loss", "grad_norm", "skipped", "stop")


class Engine:
    """Trains one module. Two of them live in one process without knowing of each other (generator, discriminator).

    Gradients reach the parameters through `backward` alone: under DeepSpeed, `torch.autograd.grad` through an output
    of `engine(...)` starts its gradient reduction. Where a gradient at the output is needed (the adaptive GAN weight),
    cut there (`out.detach().requires_grad_()`) or call `engine.module` directly under `no_grad`.

    Args:
        module: on any device; moved to `device`. Parameters without `requires_grad` stay as they are.
        optimizer: AdamW or Muon, and its settings.
        lr: learning rate by optimizer step, counted from 0.
        ranks: who takes part.
        device: where this rank computes.
        runtime: engine (deepspeed, ddp), precision and compilation.
        deepspeed: the config's `deepspeed` section; None is ZeRO stage 1.
        accumulation: micro-steps per optimizer step.
        micro_batch: samples per rank and micro-step; DeepSpeed wants to know.
        clip_grad: largest gradient norm; None or <= 0: no clipping.
        ema_decays: one running average for each.

    Raises:
        UserError: a config that `read_deepspeed_config` or `build_optimizer` refuses.
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
        deepspeed: Any = None,
        accumulation: int = 1,
        micro_batch: int = 1,
        clip_grad: float | None = None,
        ema_decays: Sequence[float | str] = (),
    ) -> None:
        runtime = runtime or Runtime(precision="fp32")
        self._begin(module, runtime, ranks, device, lr, accumulation, clip_grad)
        module.to(device)
        if self._compile:
            compile_blocks(module)
        self.optimizer_type = optimizer.type.casefold()
        self.optimizer = build_optimizer(module, optimizer, whole_parameters=runtime.engine == "ddp")
        self.module, self._ddp, self._deepspeed = module, None, None
        if runtime.engine == "deepspeed":
            config = read_deepspeed_config(deepspeed)
            check_precision(config, runtime.precision)
            self.zero_stage = zero_stage(config)
            names = {id(p): n for n, p in module.named_parameters()}
            self._deepspeed = initialize(
                module,
                self.optimizer,
                config,
                accumulation=accumulation,
                micro_batch=micro_batch,
                ranks=ranks,
                device=device,
            )
            self.shards = self._zero_shards(names)
        else:
            self.zero_stage = 0
            self._ddp = wrap_ddp(module, device) if ranks.world > 1 else None
            self.shards = PlainShards(module)
        prepare_states(self.optimizer, self.shards.optimizer_keys())
        self.ema = FlatEMA(self.shards.masters, ema_decays)

    def _begin(
        self,
        module: nn.Module,
        runtime: Runtime,
        ranks: Ranks,
        device: torch.device,
        lr: Callable[[int], float],
        accumulation: int,
        clip_grad: float | None,
    ) -> None:
        """What does not depend on who steps the optimizer."""
        self.ranks, self.device, self.lr_at, self.accumulation = ranks, device, lr, accumulation
        self.clip_grad = clip_grad if clip_grad and clip_grad > 0 else None
        self.lr = lr(0)  # of the last step
        self.steps, self._micro_steps = 0, 0
        self.stop_requested = False
        self.record = torch.zeros(len(RECORD), dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._observed: Tensor | None = None
        self._autocast = runtime.precision == "bf16"
        self._compile = runtime.compile and device.type != "xla"
        set_precision(runtime.precision)
        if runtime.deterministic:
            choose_deterministic_kernels()
        # Copied before compilation and wrapping: a copy of a compiled module still calls the original's weights.
        self._blueprint = blueprint(module)
        self._frozen = {n: p.detach().cpu().clone() for n, p in module.named_parameters() if not p.requires_grad}

    def _zero_shards(self, names: dict[int, str]) -> Shards:
        if self.zero_stage == 0:
            return PlainShards(self.module)
        kind = Zero3Shards if self.zero_stage == 3 else ZeroShards
        return kind(self._deepspeed.optimizer, names, self.ranks.rank)

    # --- one training step ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass, ready for `backward`."""
        if self._ddp is not None:
            # Read in forward and in backward: only the last micro-step of a group reduces gradients.
            self._ddp.require_backward_grad_sync = self.at_boundary
        with self.autocast():
            return (self._deepspeed or self._ddp or self.module)(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a micro-batch's mean loss; a group of micro-steps averages."""
        self._loss += loss.detach().to(torch.float64) / self.accumulation
        if self._deepspeed is not None:
            self._deepspeed.backward(loss)
        else:
            (loss / self.accumulation).backward()

    def observe(self, values: Tensor) -> None:
        """Add a 1-D tensor of figures, of one size throughout; `record` holds their sums over micro-steps and ranks."""
        values = values.detach().to(torch.float64)
        self._observed = values if self._observed is None else self._observed + values

    def step(self) -> bool:
        """Finish a micro-step; at the end of a group also clip, step the optimizer and update the EMA.

        A group whose loss or gradients are not finite on any rank changes nothing but `steps`.

        Returns:
            Whether this was the end of a group. `record` then holds the new values of `RECORD`.
        """
        boundary = self.at_boundary
        self._micro_steps += 1
        if boundary:
            self._guard_and_clip()
            self.lr = self.lr_at(self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
        if self._deepspeed is not None:
            self._deepspeed.step()
        elif boundary:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if boundary:
            self.ema.update(self.shards.masters, keep=1 - self.optimizer.found_inf, step=self.steps + 1)
            self._loss.zero_()
            self._observed = None
            self.steps += 1
        return boundary

    @property
    def at_boundary(self) -> bool:
        """Whether the current micro-step is the last of its group."""
        return (self._micro_steps + 1) % self.accumulation == 0

    def autocast(self) -> AbstractContextManager:
        """The precision of the forward pass, for modules that run beside this engine."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

    @torch.no_grad()
    def _guard_and_clip(self) -> None:
        """Sum up the group over ranks in one reduction, and hand clipping and skipping to the fused optimizer.

        Clipping as torch's `clip_grad_norm_`: g * min(1, c / (norm + 1e-6)). Both values stay on the device: the fused
        AdamW kernel divides by `grad_scale` and leaves everything untouched where `found_inf` is 1.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        gradients = list(self.shards.gradients())
        # Held whole by every rank: one of them counts.
        if gradients and (self.ranks.is_main or not self.shards.replicated):
            # In float64: the clipping factor must not depend on how ZeRO cuts the gradients.
            norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float64)
            squares += torch.stack(norms).square().sum()
        sums = torch.stack(
            [
                self._loss / self.ranks.world,
                squares,
                (~self._loss.isfinite()).double(),
                torch.full_like(self._loss, float(self.stop_requested)),
            ]
        )
        if self._observed is not None:
            sums = torch.cat([sums, self._observed])
        if self.ranks.world > 1:
            dist.all_reduce(sums)
        loss, squares, bad, stop = sums[: len(RECORD)].unbind()
        norm = squares.sqrt()
        skipped = ((bad > 0) | ~norm.isfinite()).double()
        self.record = torch.cat([torch.stack([loss, norm, skipped, stop]), sums[len(RECORD) :]])
        self.optimizer.found_inf = skipped.float()
        scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1.0) if self.clip_grad else torch.ones_like(norm)
        self.optimizer.grad_scale = scale.float()

    @torch.no_grad()
    def ema_distances(self) -> Tensor:
        """|ema - weights| / |weights| of each EMA, float64 [K] on the device, equal on all ranks; collective."""
        squares = torch.zeros(1 + len(self.ema.labels), dtype=torch.float64, device=self.device)
        if self.ranks.is_main or not self.shards.replicated:
            squares[0] = sum_of_squares(self.shards.masters)
            for i, label in enumerate(self.ema.labels, start=1):
                squares[i] = sum_of_squares(self.shards.masters, self.ema.shards(label))
        if self.ranks.world > 1:
            dist.all_reduce(squares)
        return (squares[1:] / squares[0]).sqrt()

    # --- weights ----------------------------------------------------------------------------------------------------

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The online weights as a full float32 state dict on the CPU; collective, empty where `keep` is False."""
        return self._state_dict(self.shards.masters, keep)

    def ema_weights(self, decay: float | str | None = None, *, keep: bool = True) -> dict[str, Tensor]:
        """As `weights`, of one EMA (the first if None); buffers and frozen parameters are the online ones."""
        return self._state_dict(self.ema.shards(decay), keep)

    @contextmanager
    def ema_applied(self, decay: float | str | None = None) -> Iterator[nn.Module]:
        """A module of its own, in eval mode, with EMA weights; the online module is not touched. Collective."""
        yield self._standalone(self.ema_weights(decay))

    @contextmanager
    def online_applied(self) -> Iterator[nn.Module]:
        """As `ema_applied`, with the online weights."""
        yield self._standalone(self.weights())

    def _state_dict(self, flats: Sequence[Tensor], keep: bool) -> dict[str, Tensor]:
        trained = gather(self.shards, flats, keep=keep)
        if not keep:
            return {}
        fixed = self.fixed_tensors()
        names = self._blueprint.state_dict().keys()
        return {name: trained[name] if name in trained else fixed[name] for name in names}

    def _standalone(self, state: dict[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self._blueprint)
        module.load_state_dict(state, assign=True)
        module.to(self.device).requires_grad_(False).eval()
        if self._compile:
            compile_blocks(module)
        return module

    # --- state, for checkpoints -------------------------------------------------------------------------------------

    def flat_state(self) -> dict[str, list[Tensor]]:
        """Everything that is laid out as the masters, live (not copied): master, exp_avg, exp_avg_sq, ema/<decay>.

        A tensor without elements stands for zeros that are not kept: Muon has no second moment.
        """
        states = [self.optimizer.state[key] for key in self.shards.optimizer_keys()]
        found = {"master": list(self.shards.masters)}
        for kind in ("exp_avg", "exp_avg_sq"):
            found[kind] = [state[kind].view(-1) for state in states]
        for label in self.ema.labels:
            found[f"ema/{label}"] = self.ema.shards(label)
        return found

    def fixed_tensors(self) -> dict[str, Tensor]:
        """What the optimizer does not touch: persistent buffers and frozen parameters, on the CPU."""
        persistent = self._blueprint.state_dict().keys()
        buffers = {n: b.detach().cpu().clone() for n, b in self.module.named_buffers() if n in persistent}
        return {**buffers, **self._frozen}

    def scalar_state(self) -> dict[str, float]:
        """Counters: steps asked for, and those the optimizer made (fewer, where the guard skipped one)."""
        made = self.optimizer.state[self.shards.optimizer_keys()[0]]["step"]
        return {"steps": self.steps, "optimizer_steps": float(made)}

    @torch.no_grad()
    def restore(self, scalars: dict[str, float], fixed: dict[str, Tensor]) -> None:
        """Finish a restart after `flat_state`'s tensors were written in place; collective."""
        self.steps, self._micro_steps = int(scalars["steps"]), 0
        for key in self.shards.optimizer_keys():
            self.optimizer.state[key]["step"].fill_(scalars["optimizer_steps"])
        buffers = dict(self.module.named_buffers())
        parameters = dict(self.module.named_parameters())
        for name, value in fixed.items():
            if name in buffers:
                buffers[name].copy_(value)
            else:
                with self._gathered(parameters[name]):
                    parameters[name].copy_(value)
                self._frozen[name] = value.cpu().clone()
        self.shards.publish()

    def _gathered(self, parameter: nn.Parameter) -> AbstractContextManager:
        """The whole parameter, writable on all ranks alike (ZeRO stage 3 keeps only a part)."""
        if self.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def close(self) -> None:
        """Give DeepSpeed's buffers and hooks back, for another engine in this process."""
        if self._deepspeed is not None:
            self._deepspeed.destroy()


def sum_of_squares(flats: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> Tensor:
    """Sum of squares of flat tensors, or of their differences, float64 []; piece by piece, to take little memory."""
    total = torch.zeros((), dtype=torch.float64, device=flats[0].device)
    for flat, other in zip(flats, others or [None] * len(flats), strict=True):
        pieces = flat.split(BUCKET)
        for piece, subtrahend in zip(pieces, other.split(BUCKET) if other is not None else pieces, strict=True):
            total += (piece if other is None else piece - subtrahend).norm().double().square()
    return total


def choose_deterministic_kernels() -> None:
    """Refuse kernels that add in random order; before the first matrix product, as cuBLAS asks."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def blueprint(module: nn.Module) -> nn.Module:
    """A copy of the module whose parameters have shapes and names but no memory."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def wrap_ddp(module: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """DDP that starts from rank 0's weights and leaves buffers to each rank."""
    with warnings.catch_warnings():
        # The argument's successor is not known to all versions of torch that we support.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )


def compile_blocks(module: nn.Module) -> None:
    """Compile each block of each `nn.ModuleList`, and a DiT's last layer, in place: one graph for all of a kind,
    static shapes.
    """
    for part in module.modules():
        if isinstance(part, FinalLayer):
            part.compile(dynamic=False)
        elif isinstance(part, nn.ModuleList):
            for block in part:
                block.compile(dynamic=False)
