"""Both players of decoder training and their losses, built from a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rae_fast.autoencoder.augment import DiffAugment
from rae_fast.autoencoder.discriminator import DinoBackbone, build_backbone, build_heads
from rae_fast.autoencoder.losses import EncoderPerceptual, encoder_features, load_lpips
from rae_fast.autoencoder.objective import DecoderObjective, Starts
from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.autoencoder.step import DecoderStep
from rae_fast.config import Config, GanLoss, Scheduler
from rae_fast.errors import UserError
from rae_fast.latents.encode import LatentEncoder
from rae_fast.runtime import Ranks
from rae_fast.training.batching import BatchPlan, ema_decays
from rae_fast.training.engine import Engine, compile_blocks
from rae_fast.training.schedule import build_schedule

# A few million parameters: float32 throughout, and not worth cutting over ranks.
DISCRIMINATOR_DEEPSPEED = {"zero_optimization": {"stage": 0}}


@dataclass(frozen=True)
class RunPlan:
    """Where a run computes, with what batches, and for how many optimizer steps."""

    batches: BatchPlan
    ranks: Ranks
    device: torch.device
    steps_per_epoch: int
    total_steps: int


@dataclass
class Players:
    """Decoder and discriminator with their engines.

    Attributes:
        engines: by name, for checkpoints.
        generator: the decoder's engine.
        update: makes one step of both.
        starts: when each part of the game begins.
        to_pixels: decoder output [B, N, E] -> images [B, 3, S, S] in about [0, 1].
    """

    engines: dict[str, Engine]
    generator: Engine
    update: DecoderStep
    starts: Starts
    to_pixels: Callable[[Tensor], Tensor]


def build_encoder_if_needed(config: Config, device: torch.device) -> LatentEncoder | None:
    """The frozen encoder; None where cached latents, LPIPS and no held-out images make it superfluous."""
    loss = config.gan.loss
    perceptual = loss.perceptual_weight > 0 and loss.perceptual == "encoder"
    if config.loader.source == "online" or perceptual or config.eval.data_path or config.data.val_source:
        return LatentEncoder(config.stage_1.params, config.cache.precision, device)
    return None


def build_players(config: Config, plan: RunPlan, perceptual: nn.Module | None) -> Players:
    """Decoder, discriminator and losses of a config.

    Args:
        config: the whole configuration.
        plan: where, with what batches and for how long.
        perceptual: what `build_perceptual` gave.

    Raises:
        UserError: weights that a part needs cannot be found, or sizes do not fit.
    """
    rae = build_trainable(config, plan.device)
    generator = _generator_engine(config, plan, rae)
    starts = Starts.of(config.gan.loss, steps_per_epoch=plan.steps_per_epoch, images_per_step=plan.batches.global_batch)
    engines, backbone = {"model": generator}, None
    if starts.discriminator is not None:
        backbone = build_backbone(config.gan.disc.arch, seed=config.training.global_seed).to(plan.device)
        if config.runtime.compile:
            compile_blocks(backbone)
        engines["disc"] = _discriminator_engine(config, plan, backbone, starts.discriminator)
    augment = config.gan.disc.augment
    objective = DecoderObjective(
        config.gan.loss,
        rae.patches_to_pixels,
        perceptual,
        backbone,
        DiffAugment(augment.prob, augment.cutout),
        generator.autocast,
        mean_over_ranks(plan.ranks),
    )
    update = DecoderStep(
        generator,
        engines.get("disc"),
        objective,
        tau=config.stage_1.params.noise_tau,
        seed=config.training.global_seed,
    )
    return Players(engines, generator, update, starts, rae.patches_to_pixels)


def build_trainable(config: Config, device: torch.device) -> RAE:
    """The decoder with seeded or given weights, trainable; latents come to it before normalization."""
    stage_1 = replace(config.stage_1, params=replace(config.stage_1.params, normalization_stat_path=None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.global_seed)
        rae = build_rae(stage_1, need_encoder=False)
    assert rae.decoder is not None
    rae.decoder.requires_grad_(True)
    rae.decoder.decoder_pos_embed.requires_grad_(config.stage_1.params.train_positions)
    rae.decoder.activation_checkpointing = config.runtime.activation_checkpointing
    return rae.to(device)


def build_perceptual(loss: GanLoss, encoder: LatentEncoder | None, device: torch.device) -> nn.Module | None:
    """LPIPS, the distance in the frozen encoder's features, or None at weight zero.

    Raises:
        UserError: LPIPS is asked for and its VGG16 weights are not here.
    """
    if loss.perceptual_weight <= 0:
        return None
    if loss.perceptual == "lpips":
        lpips = load_lpips(loss.lpips_weights).to(device)
        # Tensor cores want the channels of a convolution last.
        return lpips.to(memory_format=torch.channels_last) if device.type == "cuda" else lpips
    assert encoder is not None
    return EncoderPerceptual(encoder_features(encoder.encoder))


def _generator_engine(config: Config, plan: RunPlan, rae: RAE) -> Engine:
    assert rae.decoder is not None
    training = config.training
    return Engine(
        rae.decoder,
        optimizer=training.optimizer,
        lr=build_schedule(
            training.scheduler,
            lr=training.optimizer.lr,
            steps_per_epoch=plan.steps_per_epoch,
            total_steps=plan.total_steps,
        ),
        ranks=plan.ranks,
        device=plan.device,
        runtime=config.runtime,
        deepspeed=config.deepspeed,
        accumulation=plan.batches.accumulation,
        micro_batch=plan.batches.micro_batch,
        clip_grad=training.clip_grad,
        ema_decays=ema_decays(training),
    )


def _discriminator_engine(config: Config, plan: RunPlan, backbone: DinoBackbone, first: int) -> Engine:
    """The heads' engine; its schedule begins at step `first`."""
    disc, updates = config.gan.disc, config.gan.loss.disc_updates
    schedule = build_schedule(
        disc_scheduler(disc.scheduler, first, plan.steps_per_epoch),
        lr=disc.optimizer.lr,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=max(1, plan.total_steps - first),
    )
    return Engine(
        build_heads(disc.arch, backbone, seed=config.training.global_seed),
        optimizer=disc.optimizer,
        lr=lambda step: schedule(step // updates),
        ranks=plan.ranks,
        device=plan.device,
        # Compilation would gain nothing on a few convolutions along the token axis.
        runtime=replace(config.runtime, compile=False),
        deepspeed=DISCRIMINATOR_DEEPSPEED,
        accumulation=plan.batches.accumulation,
        micro_batch=plan.batches.micro_batch,
        clip_grad=config.training.clip_grad,
    )


def disc_scheduler(scheduler: Scheduler, first: int, steps_per_epoch: int) -> Scheduler:
    """The discriminator's schedule, counted in its own steps: it warms up when it starts, and reaches `final_lr` when
    the config says.

    The reference counts its own steps without moving the end, and so ends far above `final_lr`.
    """
    end = scheduler.decay_end_steps
    if end is None and scheduler.decay_end_epoch is not None:
        end = int(scheduler.decay_end_epoch * steps_per_epoch)
    if end is None:
        return scheduler
    if end <= first:
        raise UserError(
            f"gan.disc.scheduler ends at step {end}, but the discriminator starts at step {first}",
            "an end after its start",
            "check decay_end_epoch, and disc_upd_start in gan.loss",
        )
    warmup = scheduler.warmup_steps
    if warmup is None:
        warmup = int((scheduler.warmup_epochs or 0) * steps_per_epoch)
    return replace(scheduler, decay_end_steps=max(end - first, warmup), warmup_steps=warmup)


def mean_over_ranks(ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """Averages a tensor over all ranks."""

    def mean(tensor: Tensor) -> Tensor:
        if ranks.world > 1:
            dist.all_reduce(tensor)
            tensor /= ranks.world
        return tensor

    return mean
