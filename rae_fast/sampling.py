"""From labels and seeds to images: noise, guided integration, decoding.

Sample i depends on (seed, i) alone: its noise is drawn by counter from those two numbers.

Shapes: B samples, [C, H, W] a latent, [3, S, S] an image.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rae_fast import rng
from rae_fast.autoencoder.rae import RAE
from rae_fast.config import Config
from rae_fast.dit.registry import build_dit
from rae_fast.errors import UserError
from rae_fast.evaluation.images import to_uint8
from rae_fast.geometry import Geometry, dit_params
from rae_fast.interop.official import load_dit_weights
from rae_fast.rng import Stream
from rae_fast.runtime import DTYPES
from rae_fast.transport.guidance import Velocity, guided_velocity
from rae_fast.transport.objective import Transport
from rae_fast.transport.samplers import sample

EXACT_BATCH = 32


@dataclass
class LatentSampler:
    """A model, its guide if it has one, and the settings to draw latents with."""

    model: nn.Module
    config: Config
    geometry: Geometry
    guide: nn.Module | None = None
    guidance_scale: float | None = None  # None: the config's

    def velocity(self, labels_B: Tensor) -> Velocity:
        """The guided prediction for these labels."""
        guidance = self.config.guidance
        scale = guidance.scale if self.guidance_scale is None else self.guidance_scale
        null_label = self.geometry.null_label
        if scale > 1 and guidance.method == "cfg" and not self.model.has_null_label:
            raise UserError(
                f"guidance.scale is {scale}, but the model has no null label (class_dropout_prob 0)",
                "guidance.scale 1, or a model trained with label dropout",
            )
        return guided_velocity(
            self.model,
            y=labels_B,
            null_label=self.model.num_classes if null_label is None else null_label,
            scale=scale,
            t_min=guidance.t_min,
            t_max=guidance.t_max,
            method=guidance.method,
            guide=self.guide,
        )

    @torch.no_grad()
    def draw(self, labels_B: Tensor, index_B: Tensor, seed: int) -> Tensor:
        """Latents float32 [B, C, H, W], normalized, for labels and sample indices, both int64 [B]."""
        shape = self.geometry.latent_shape
        noise = rng.normal(seed, 0, index_B, Stream.SAMPLE, shape)
        transport = Transport.from_config(self.config, shape)
        dtype = DTYPES[self.config.runtime.precision]
        # On a CPU the autocast of a small model costs more than it saves, and float32 is reproducible.
        mixed = dtype != torch.float32 and noise.device.type == "cuda"
        with torch.autocast(noise.device.type, dtype) if mixed else nullcontext():
            return sample(
                self.config.sampler,
                transport,
                self.velocity(labels_B),
                noise,
                lambda step: rng.normal(seed, step + 1, index_B, Stream.SAMPLE, shape),
            ).float()


def load_sampler(config: Config, geometry: Geometry, device: torch.device) -> LatentSampler:
    """The model of `stage_2.ckpt` (EMA weights where the file holds them) and the guide, in evaluation mode.

    Raises:
        UserError: no checkpoint is given, or it does not fit the model.
    """
    if config.stage_2.ckpt is None:
        raise UserError("stage_2.ckpt is not set", "the checkpoint to sample from", "set stage_2.ckpt=<file>")
    model = build_dit(config.stage_2.target, dit_params(config, geometry))
    load_dit_weights(model, config.stage_2.ckpt)
    guide = None
    section = config.guidance.guidance_model
    if section is not None and config.guidance.method == "autoguidance" and config.guidance.scale > 1:
        if section.ckpt is None:
            raise UserError("guidance.guidance_model.ckpt is not set", "the checkpoint of the guide")
        guide = build_dit(section.target, section.params)
        load_dit_weights(guide, section.ckpt)
        guide = guide.to(device).eval()
    return LatentSampler(model.to(device).eval(), config, geometry, guide)


@torch.no_grad()
def draw_images(sampler: LatentSampler, rae: RAE, labels: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """Images uint8 [n, S, S, 3] for labels and sample indices, both int64 [n].

    Matrix products round differently for different numbers of rows, so the work is always done in pieces of exactly
    `EXACT_BATCH` rows, the last one padded: image i has the same bytes whatever it is drawn together with.
    """
    device = next(sampler.model.parameters()).device
    images = []
    for start in range(0, len(index), EXACT_BATCH):
        piece = slice(start, start + EXACT_BATCH)
        padding = (0, EXACT_BATCH - len(index[piece]))
        labels_B = torch.as_tensor(np.pad(labels[piece], padding, mode="edge"), device=device)
        index_B = torch.as_tensor(np.pad(index[piece], padding, mode="edge"), device=device)
        decoded = rae.decode(sampler.draw(labels_B, index_B, seed))
        images.append(to_uint8(decoded)[: len(index[piece])])
    return np.concatenate(images)
