"""What a training step of a diffusion transformer takes of a device's memory, and what to change when it is too much.

States are exact; activations are what the reference's blocks keep under bfloat16 autocast, measured in units of one
token's width: 37 for a trunk block, 41 for a head block (eager; about half with compiled or fused blocks).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from rae_fast.dit.trunk import DiffusionTransformer

BLOCK_UNITS = 40
CHECKPOINT_UNITS = 2  # the float32 input of a block
HEADROOM = 0.92  # share of a device that a run can use: context, fragmentation, communication buffers


@dataclass(frozen=True)
class MemoryPlan:
    """One rank's training memory.

    Attributes:
        parameters: number of trained parameters.
        block_values: values of width N x D over all blocks, per sample.
        largest_block: the largest block's N x D, per sample.
        micro_batch: samples of a micro-step.
        world: ranks that share the states.
        zero_stage: of DeepSpeed; 0 for DDP.
        averages: EMA copies.
        value_bytes: of an activation, 2 or 4.
        checkpointing: activations are recomputed.
    """

    parameters: int
    block_values: int
    largest_block: int
    micro_batch: int
    world: int = 1
    zero_stage: int = 1
    averages: int = 1
    value_bytes: int = 2
    checkpointing: bool = False

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients, master copy, two moments and the EMAs, in float32."""
        shares = 2 + self.averages + (1 if self.zero_stage else 0)
        sharded = shares * 4 * self.parameters // (self.world if self.zero_stage else 1)
        weights = 4 * self.parameters // (self.world if self.zero_stage == 3 else 1)
        gradients = 4 * self.parameters // (self.world if self.zero_stage >= 2 else 1)
        return sharded + weights + gradients

    @property
    def activation_bytes(self) -> int:
        """What the backward pass needs of the forward pass."""
        if self.checkpointing:
            units = CHECKPOINT_UNITS * self.block_values + BLOCK_UNITS * self.largest_block
        else:
            units = BLOCK_UNITS * self.block_values
        return units * self.value_bytes * self.micro_batch

    @property
    def total_bytes(self) -> int:
        """States and activations."""
        return self.state_bytes + self.activation_bytes


def plan_memory(
    model: DiffusionTransformer,
    *,
    micro_batch: int,
    world: int = 1,
    zero_stage: int = 1,
    averages: int = 1,
    value_bytes: int = 2,
    checkpointing: bool = False,
) -> MemoryPlan:
    """The memory plan of a model; see `MemoryPlan` for the arguments."""
    tokens = model.grid**2
    widths = [width_of(block) for block in model.blocks]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = [tokens * width for width in widths]
    return MemoryPlan(
        parameters, sum(blocks), max(blocks), micro_batch, world, zero_stage, averages, value_bytes, checkpointing
    )


def width_of(block: nn.Module) -> int:
    """Width of a block, which its modulation takes in."""
    return next(module for module in block.modules() if isinstance(module, nn.Linear)).in_features


def advise(plan: MemoryPlan, device_bytes: int) -> str:
    """The mildest change with which the plan fits: a smaller micro-batch, recomputation, another ZeRO stage."""
    room = int(device_bytes * HEADROOM)
    candidates = []
    for checkpointing in (plan.checkpointing, True):
        for stage in (plan.zero_stage, *(s for s in (1, 2, 3) if s > plan.zero_stage and plan.world > 1)):
            changed = replace(plan, checkpointing=checkpointing, zero_stage=stage, micro_batch=1)
            per_sample = changed.activation_bytes
            fitting = min((room - changed.state_bytes) // per_sample, plan.micro_batch)
            if fitting >= 1:
                candidates.append(replace(changed, micro_batch=power_of_two(int(fitting))))
    if not candidates:
        return f"no setting fits {gib(device_bytes)}: use more or larger devices, or a smaller model"
    best = max(candidates, key=lambda c: (c.micro_batch, not c.checkpointing, -c.zero_stage))
    if (best.micro_batch, best.checkpointing, best.zero_stage) == (
        plan.micro_batch,
        plan.checkpointing,
        plan.zero_stage,
    ):
        # The estimate says that it fits, the device that it does not: the device is right.
        best = replace(best, micro_batch=max(best.micro_batch // 2, 1))
    settings = [f"training.batch_size={best.micro_batch}"]
    if best.checkpointing and not plan.checkpointing:
        settings.append("runtime.activation_checkpointing=true")
    if best.zero_stage != plan.zero_stage:
        settings.append(f"deepspeed.zero_optimization.stage={best.zero_stage}")
    return f"would fit by our estimate ({gib(best.total_bytes)}): {' '.join(settings)}"


def power_of_two(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << (n.bit_length() - 1)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"
