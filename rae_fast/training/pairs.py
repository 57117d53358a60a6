"""Latents to losses: times and noise by sample, the interpolated latent, what the model should say of it.

Shapes: B samples of a micro-batch, C, H, W of a latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rae_fast import rng
from rae_fast.config import Config
from rae_fast.rng import Stream
from rae_fast.transport.objective import ModelFunction, Transport

if TYPE_CHECKING:  # benchmarks step on machines without the store's packages
    from rae_fast.latents.loader import LatentBatch


class PairMaker:
    """The objective of a config on batches of the loader.

    With `runtime.kernels: triton` noise, interpolation and target velocity are made in one pass over the latents; the
    counter-based noise consists of the same integers either way.

    Args:
        config: path, prediction, times, kernels.
        latent_shape: [C, H, W], for the time shift.
    """

    def __init__(self, config: Config, latent_shape: tuple[int, int, int]) -> None:
        self.transport = Transport.from_config(config, latent_shape)
        self.fused = config.runtime.kernels == "triton" and self.transport.prediction == "velocity"

    def loss(self, model: ModelFunction, batch: LatentBatch, seed: int) -> tuple[Tensor, Tensor]:
        """(loss of each sample float32 [B], times [B]); all random draws are by (seed, epoch, row)."""
        draw = (seed, batch.epoch, batch.index_B)
        t_B = self.transport.sample_time(rng.uniform(*draw, Stream.TIME))
        if self.fused:
            x_BCHW, velocity_BCHW = self._pair(batch, t_B, seed)
            error = model(x_BCHW, t_B).float() - velocity_BCHW
            return error.square().flatten(1).mean(dim=1), t_B
        noise_BCHW = rng.normal(*draw, Stream.NOISE, tuple(batch.latents_BCHW.shape[1:]))
        return self.transport.loss(model, batch.latents_BCHW, t_B, noise_BCHW), t_B

    def _pair(self, batch: LatentBatch, t_B: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        from rae_kernels.interpolate import interpolate

        c = self.transport.path.coefficients(t_B)
        path_B4 = torch.stack([c.alpha, c.sigma, c.d_alpha, c.d_sigma], dim=1)
        where = {"seed": seed, "epoch": batch.epoch, "stream": int(Stream.NOISE)}
        return interpolate(batch.latents_BCHW, None, 1.0, path_B4, batch.index_B, **where)
