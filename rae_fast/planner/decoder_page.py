"""What a decoder training is going to do, in lines for people."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.planner.host import data_facts
from rae_fast.runtime import Ranks, ranks_from_environment
from rae_fast.training.batching import count_steps, plan_batches


def planned_decoder(config: Config, ranks: Ranks | None = None) -> str:
    """Sizes, batches and steps, for the `--dry-run` of decoder training.

    Raises:
        UserError: sections that contradict each other, or no decoder.
    """
    geometry, params = resolve_geometry(config), config.stage_1.params
    if params.decoder_config_path is None:
        raise UserError("stage_1.params.decoder_config_path is not set", "a decoder's config.json, its folder or name")
    channels, grid, _ = geometry.latent_shape
    sizes = replace(
        load_decoder_config(params.decoder_config_path),
        hidden_size=channels,
        grid=grid,
        patch_size=params.decoder_patch_size,
    )
    with torch.device("meta"):
        decoder = ViTDecoder(sizes)
    data = data_facts(config, None)
    batches = plan_batches(config.training, ranks or ranks_from_environment())
    steps_per_epoch = data.images // batches.global_batch
    total = count_steps(config.training, steps_per_epoch)
    loss = config.gan.loss
    return "\n".join(
        [
            f"decoder of {sum(prod(p.shape) for p in decoder.parameters()):,} parameters: latents "
            f"{list(geometry.latent_shape)} to {geometry.image_size} px",
            f"{data.images:,} images ({data.origin}), {config.loader.source}",
            f"{batches.global_batch} images a step: {batches.micro_batch} a rank, accumulated "
            f"{batches.accumulation} times; {steps_per_epoch:,} steps an epoch, {total:,} in all",
            f"L1 from the start; {loss.perceptual} x {loss.perceptual_weight} from {loss.lpips_start}; GAN x "
            f"{loss.disc_weight} from {loss.disc_start}, discriminator from "
            f"{loss.disc_start if loss.disc_upd_start is None else loss.disc_upd_start} ({loss.starts_in})",
        ]
    )
