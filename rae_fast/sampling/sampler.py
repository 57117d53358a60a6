"""From labels and seeds to latents and images: noise, guided integration, decoding.

Sample i depends on (seed, i) alone: its noise is drawn by counter from those two numbers, and matrix products, which
round differently for different numbers of rows, always get the same number of rows.

Shapes: B samples of a piece, n samples in all, [C, H, W] a latent, [S, S, 3] an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rae_fast import rng
from rae_fast.autoencoder.rae import RAE
from rae_fast.config import Config
from rae_fast.dit.fused import use_kernels
from rae_fast.dit.registry import build_dit
from rae_fast.dit.trunk import DiffusionTransformer
from rae_fast.errors import UserError
from rae_fast.evaluation.images import to_uint8
from rae_fast.geometry import Geometry, dit_params
from rae_fast.rng import Stream
from rae_fast.runtime import DTYPES
from rae_fast.sampling.accelerate import accelerate, store_for_autocast
from rae_fast.transport.guidance import Velocity, guided_velocity
from rae_fast.transport.objective import Transport
from rae_fast.transport.samplers import ADAPTIVE, sample

EXACT_BATCH = 32
COUPLED = tuple(name for name in ADAPTIVE if name != "dopri5")


@dataclass
class LatentSampler:
    """A model, its guide if it has one, and the settings to draw latents with.

    Attributes:
        model: in evaluation mode.
        config: sampler, guidance, transport, misc and runtime.precision are used.
        geometry: sizes.
        guide: the weaker model of autoguidance.
        guidance_scale: None is the config's.
        rows: samples computed at once; pixels depend on it by rounding, so it is the same for all of a set.
    """

    model: nn.Module
    config: Config
    geometry: Geometry
    guide: nn.Module | None = None
    guidance_scale: float | None = None
    rows: int = EXACT_BATCH

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def rows_together(self) -> int:
        """Samples that are integrated at once: one for solvers that choose a common step by the error of them all."""
        sampler = self.config.sampler
        coupled = sampler.mode.upper() == "ODE" and sampler.params.sampling_method.casefold() in COUPLED
        return 1 if coupled else self.rows

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

    def noise(self, index_B: Tensor, seed: int, step: int = 0) -> Tensor:
        """Standard normal float32 [B, C, H, W] of samples: what they start from, or step k >= 1 of the SDE."""
        return rng.normal(seed, step, index_B, Stream.SAMPLE, self.geometry.latent_shape)

    def draw(self, labels_B: Tensor, index_B: Tensor, seed: int) -> Tensor:
        """Latents float32 [B, C, H, W], normalized, for labels and sample indices, both int64 [B]."""
        return self.integrate(self.noise(index_B, seed), labels_B, lambda step: self.noise(index_B, seed, step + 1))

    @torch.no_grad()
    def integrate(self, noise_BCHW: Tensor, labels_B: Tensor, step_noise: Callable[[int], Tensor]) -> Tensor:
        """Latents float32 [B, C, H, W] from the noise they start from; nothing in it waits for the device.

        Args:
            noise_BCHW: standard normal, float32.
            labels_B: int64.
            step_noise: k -> the noise of the SDE's k-th step, k from 0; not called for an ODE.
        """
        transport = Transport.from_config(self.config, self.geometry.latent_shape)
        dtype, device = DTYPES[self.config.runtime.precision], noise_BCHW.device.type
        with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
            z = sample(self.config.sampler, transport, self.velocity(labels_B), noise_BCHW, step_noise)
        return z.float()


def load_sampler(
    config: Config,
    geometry: Geometry,
    device: torch.device,
    *,
    rows: int = EXACT_BATCH,
    cuda_graphs: bool = False,
    ema: str | None = None,
    say: bool = True,
) -> LatentSampler:
    """The model of `stage_2.ckpt` (EMA weights where the file holds them) and the guide, in evaluation mode.

    Args:
        config: stage_2, guidance, and of runtime precision, kernels and compile.
        geometry: sizes.
        device: where to draw.
        rows: samples computed at once.
        cuda_graphs: replay each forward pass as one CUDA graph.
        ema: which average to take where the weights are a run's checkpoints; None: the first one.
        say: print a line where something asked for cannot be had here.

    Raises:
        UserError: no checkpoint is given, or it does not fit the model.
    """
    if config.stage_2.ckpt is None:
        raise UserError(
            "stage_2.ckpt is not set", "the checkpoint to sample from", "set stage_2.ckpt=<file>, or give --run"
        )
    model = build_dit(config.stage_2.target, dit_params(config, geometry))
    load_weights(model, config.stage_2.ckpt, ema)
    guide = None
    section = config.guidance.guidance_model
    if section is not None and config.guidance.method == "autoguidance" and config.guidance.scale > 1:
        if section.ckpt is None:
            raise UserError("guidance.guidance_model.ckpt is not set", "the checkpoint of the guide")
        as_stage_2 = replace(config.stage_2, target=section.target, params=section.params)
        guide = build_dit(section.target, dit_params(replace(config, stage_2=as_stage_2), geometry))
        load_weights(guide, section.ckpt)
    for module in (model, guide):
        if module is not None:
            _prepare(module, config, device, cuda_graphs, say and module is model)
    return LatentSampler(model, config, geometry, guide, rows=rows)


def load_weights(model: nn.Module, path: str | Path, ema: str | None = None) -> None:
    """Weights from a file, or from the checkpoints of a run, EMA where there is one.

    Args:
        model: is filled.
        path: a file; or a run folder, its `checkpoints`, or one of those.
        ema: of checkpoints; see `checkpoint_weights`.

    Raises:
        UserError: it cannot be read, or is of another model.
    """
    # Here, as a machine that only measures need not have what the rest of these imports.
    from rae_fast.interop.official import likely_cause, load_dit_weights
    from rae_fast.weights import load_strictly

    if not Path(path).is_dir():
        load_dit_weights(model, path)
        return
    from rae_fast.training.export import checkpoint_weights

    tensors = checkpoint_weights(path, ema=ema)
    load_strictly(model, tensors, path, likely_cause(model.state_dict(), tensors))


def _prepare(model: DiffusionTransformer, config: Config, device: torch.device, cuda_graphs: bool, say: bool) -> None:
    model.to(device).eval().requires_grad_(False)
    use_kernels(model, config.runtime.kernels)
    store_for_autocast(model, DTYPES[config.runtime.precision])
    accelerate(model, device, compiled=config.runtime.compile, cuda_graphs=cuda_graphs, say=say)


def draw_latents(sampler: LatentSampler, labels: np.ndarray, index: np.ndarray, seed: int) -> Tensor:
    """Normalized latents float32 [n, C, H, W] on the sampler's device, for labels and sample indices int64 [n].

    The work is done in pieces of exactly `sampler.rows` rows, the last one padded: latent i has the same bits whatever
    it is drawn together with.
    """
    drawn = []
    for piece, padded in pieces(len(index), sampler.rows_together):
        labels_B = torch.as_tensor(labels[padded], device=sampler.device)
        index_B = torch.as_tensor(index[padded], device=sampler.device)
        drawn.append(sampler.draw(labels_B, index_B, seed)[: len(piece)])
    return torch.cat(drawn)


@torch.no_grad()
def decode_images(rae: RAE, latents_nCHW: Tensor, rows: int = EXACT_BATCH) -> np.ndarray:
    """Images uint8 [n, S, S, 3] of normalized latents, in pieces of exactly `rows` rows as in `draw_latents`."""
    images = []
    for piece, padded in pieces(len(latents_nCHW), rows):
        decoded = rae.decode(latents_nCHW[torch.as_tensor(padded, device=latents_nCHW.device)])
        images.append(to_uint8(decoded[: len(piece)]))
    return np.concatenate(images)


def draw_images(sampler: LatentSampler, rae: RAE, labels: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """Images uint8 [n, S, S, 3] for labels and sample indices, both int64 [n]."""
    return decode_images(rae, draw_latents(sampler, labels, index, seed), sampler.rows)


def pieces(total: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions, the same padded to `rows` by repeating the last one) for each `rows` of `total` positions."""
    for start in range(0, total, rows):
        piece = np.arange(start, min(start + rows, total))
        yield piece, np.pad(piece, (0, rows - len(piece)), mode="edge")
