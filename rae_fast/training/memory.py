"""What a training step of a diffusion transformer takes of a device's memory, and what to change when it is too much.

States are exact. Activations are bytes for each value of a block's width, as autograd saves them of eager blocks with
the plain operations (a test counts them); compiled or fused blocks save about half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from rae_fast.dit.blocks import OwnTypeLinear
from rae_fast.dit.trunk import DiffusionTransformer

# By bytes of an activation (2: bfloat16 autocast, 4: float32), for blocks modulated by sample and by token: what a
# block saves for its backward pass, and what is left of it when it is recomputed (its input).
SAVED_BYTES = {2: (65, 88), 4: (107, 146)}
RECOMPUTED_BYTES = {2: (4, 8), 4: (4, 13)}
LAST_LAYER_BYTES = 18  # with the embedding; never recomputed
HEADROOM = 0.92  # share of a device that a run can use: context, fragmentation, communication buffers


@dataclass(frozen=True)
class MemoryPlan:
    """One rank's training memory.

    Attributes:
        parameters: number of trained parameters.
        sample_values: N x D over all blocks that are modulated by sample, for one image.
        token_values: the same over blocks that are modulated by token.
        last_values: N x D of the last layer, for one image.
        largest_block: (modulated by token?, N x D) of the block that saves most.
        cast_parameters: parameters that autocast keeps a 16-bit copy of, from forward to backward.
        micro_batch: samples of a micro-step.
        world: ranks that share the states.
        zero_stage: of DeepSpeed; 0 for DDP.
        averages: EMA copies.
        value_bytes: of an activation, 2 or 4.
        checkpointing: activations are recomputed.
    """

    parameters: int
    sample_values: int
    token_values: int
    last_values: int
    largest_block: tuple[bool, int]
    cast_parameters: int
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
        """What the backward pass needs of the forward pass, of a whole micro-batch."""
        saved = SAVED_BYTES[self.value_bytes]
        by_sample, by_token = RECOMPUTED_BYTES[self.value_bytes] if self.checkpointing else saved
        kept = by_sample * self.sample_values + by_token * self.token_values + LAST_LAYER_BYTES * self.last_values
        if self.checkpointing:
            kind, values = self.largest_block
            kept += saved[kind] * values
        return kept * self.micro_batch

    @property
    def copy_bytes(self) -> int:
        """16-bit copies of the weights; a recomputed block makes its own anew."""
        return 2 * self.cast_parameters if self.value_bytes == 2 and not self.checkpointing else 0

    @property
    def fixed_bytes(self) -> int:
        """What does not grow with the micro-batch."""
        return self.state_bytes + self.copy_bytes

    @property
    def total_bytes(self) -> int:
        """States, copies and activations."""
        return self.fixed_bytes + self.activation_bytes


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
    blocks = [(modulated_by_token(block), tokens * width_of(block)) for block in model.blocks]
    saved = SAVED_BYTES[value_bytes]
    return MemoryPlan(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        sample_values=sum(values for by_token, values in blocks if not by_token),
        token_values=sum(values for by_token, values in blocks if by_token),
        last_values=blocks[-1][1],
        largest_block=max(blocks, key=lambda block: saved[block[0]] * block[1]),
        cast_parameters=sum(
            p.numel()
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, OwnTypeLinear)
            for p in module.parameters(recurse=False)
        ),
        micro_batch=micro_batch,
        world=world,
        zero_stage=zero_stage,
        averages=averages,
        value_bytes=value_bytes,
        checkpointing=checkpointing,
    )


def modulated_by_token(block: nn.Module) -> bool:
    """Whether each token has a modulation of its own."""
    return not any(isinstance(module, OwnTypeLinear) for module in block.modules())


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
            fitting = min((room - changed.fixed_bytes) // per_sample, plan.micro_batch)
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
        settings.append(f"deepspeed=configs/deepspeed/zero{best.zero_stage}.json")
    return f"would fit by our estimate ({gib(best.total_bytes)}): {' '.join(settings)}"


def power_of_two(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << (n.bit_length() - 1)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"
