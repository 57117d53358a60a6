"""Sample grids while training: the EMA weights, the same noise and labels every time.

Shapes: images uint8 [N, S, S, 3].
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Config
from rae_fast.geometry import Geometry
from rae_fast.latents.store import LatentStore
from rae_fast.training.engine import Engine

COLUMNS = 8
IMAGES = 32
SEED = 0


def has_decoder(config: Config) -> bool:
    """Whether the config names trained decoder weights."""
    return bool(config.stage_1.params.pretrained_decoder_path or config.stage_1.ckpt)


def decoder_of(config: Config, store: LatentStore | None, device: torch.device) -> RAE:
    """The decoding half of the autoencoder, with the store's own statistics; the config's where there is no store.

    Raises:
        UserError: see `build_rae`.
    """
    if store is None:
        return build_rae(config.stage_1, need_encoder=False).to(device).eval().requires_grad_(False)
    section = replace(config.stage_1, params=replace(config.stage_1.params, normalization_stat_path=None))
    rae = build_rae(section, need_encoder=False)
    rae.latent_mean, rae.latent_var = store.mean.clone(), store.var.clone()
    rae.eps = store.attrs["normalization"]["eps"]
    return rae.to(device).eval().requires_grad_(False)


def training_guidance(config: Config) -> float:
    """Guidance scale of samples drawn while training: `training.cfg_scale`, else the config's classifier-free one."""
    if config.training.cfg_scale is not None:
        return config.training.cfg_scale
    return config.guidance.scale if config.guidance.method == "cfg" else 1.0


def without_guide(config: Config) -> Config:
    """The config for samples drawn while training, which no second model guides."""
    return replace(config, guidance=replace(config.guidance, method="cfg", guidance_model=None))


def preview_labels(num_classes: int) -> np.ndarray:
    """Labels of the grid, int64 [IMAGES]: a row for each of up to four classes spread over all of them."""
    rows = IMAGES // COLUMNS
    return np.repeat(np.arange(rows) * max(num_classes, 1) // rows, COLUMNS)


class Previews:
    """Draws grids into samples/step-<step>.png.

    Args:
        config: guidance, sampler, precision.
        geometry: sizes.
        rae: decodes.
        folder: the run folder.
    """

    def __init__(self, config: Config, geometry: Geometry, rae: RAE, folder: Path) -> None:
        self.scale = training_guidance(config)
        self.config, self.geometry = without_guide(config), geometry
        self.rae, self.folder = rae, Path(folder) / "samples"

    def draw(self, engine: Engine, step: int) -> Path | None:
        """Draw with the first EMA (online weights if none is kept); collective, rank 0 writes and gets the path."""
        from rae_fast.evaluation.images import save_grid
        from rae_fast.sampling import LatentSampler, draw_images

        applied = engine.ema_applied() if engine.ema.labels else engine.online_applied()
        with applied as module:
            if not engine.ranks.is_main:
                return None
            scale = self.scale if module.has_null_label else 1.0
            sampler = LatentSampler(module, self.config, self.geometry, guidance_scale=scale)
            labels = preview_labels(module.num_classes)
            images = draw_images(sampler, self.rae, labels, np.arange(len(labels)), SEED)
        path = self.folder / f"step-{step:07d}.png"
        save_grid(path, images, COLUMNS)
        return path
