"""Frechet distance between generated and stored latents while training.

Features are the mean tokens that `tools/evaluate.py generation --features encoder` takes from a store, so the distance
needs neither pixels nor another network. Drawing is by (seed, sample index), sharded over ranks, and touches
no random state of the training.

Shapes: B samples, C, H, W of a latent, D = C features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rae_fast.config import Config
from rae_fast.evaluation.features import mean_token
from rae_fast.evaluation.frechet import StreamingMoments, frechet_distance
from rae_fast.evaluation.labels import equal_labels
from rae_fast.geometry import Geometry
from rae_fast.latents.store import LatentStore
from rae_fast.rng import permutation
from rae_fast.runtime import Ranks
from rae_fast.training.engine import Engine
from rae_fast.training.monitor import append_line, truncate_log
from rae_fast.training.previews import training_guidance, without_guide

FILE = "eval.jsonl"
REFERENCE_IMAGES = 50_000
BATCH = 32
SEED = 1  # of labels and noise; the sample grids use another


class OnlineEvaluation:
    """Evaluates an engine's EMA (and, with `eval.eval_model`, its online weights) into eval.jsonl.

    Args:
        config: sampler, number of images.
        geometry: sizes.
        store: where real latents come from.
        folder: the run folder.
        ranks: who takes part.
        device: where this rank computes.
        start_step: steps done by earlier runs of this folder; later lines are cut off.
    """

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        store: LatentStore,
        folder: Path,
        ranks: Ranks,
        device: torch.device,
        start_step: int = 0,
    ) -> None:
        self.config, self.geometry, self.store = config, geometry, store
        self.path, self.ranks, self.device = Path(folder) / FILE, ranks, device
        self._reference: tuple[np.ndarray, np.ndarray] | None = None
        if ranks.is_main:
            truncate_log(self.path, start_step)

    def evaluate(self, engine: Engine, step: int, images: int) -> list[dict[str, Any]]:
        """One line for each set of weights; collective, rank 0 writes."""
        if self._reference is None:
            self._reference = self._moments(self._stored())
        lines = []
        for weights in ("ema", "online") if self.config.eval.eval_model else ("ema",):
            applied = engine.ema_applied() if weights == "ema" and engine.ema.labels else engine.online_applied()
            with applied as module:
                generated = self._moments(self._generated(module))
            distance = frechet_distance(*self._reference, *generated)
            facts = {"fd_latent": distance, "generated": self.config.eval.num_images}
            lines.append({"step": step, "images": images, "weights": weights, **facts})
        if self.ranks.is_main:
            for line in lines:
                append_line(self.path, line)
        return lines

    def features(self, z_BCHW: Tensor) -> Tensor:
        """[B, D] of normalized latents."""
        return mean_token(self.store.denormalize(z_BCHW.float()))

    def _stored(self) -> Iterator[Tensor]:
        """Features of this rank's share of the real latents: all, or a seeded subset."""
        rows = np.flatnonzero(self.store.valid)
        chosen = np.sort(rows[permutation(SEED, 0, len(rows))[:REFERENCE_IMAGES]])
        mine = chosen[self.ranks.rank :: self.ranks.world]
        view = "original" if "original" in self.store.views else self.store.views[0]
        for start in range(0, len(mine), BATCH):
            yield self.features(self.store.read(mine[start : start + BATCH], view).to(self.device))

    @torch.no_grad()
    def _generated(self, module: nn.Module) -> Iterator[Tensor]:
        """Features of this rank's share of generated latents, equally many of every class."""
        from rae_fast.sampling import LatentSampler

        scale = training_guidance(self.config) if module.has_null_label else 1.0
        sampler = LatentSampler(module, without_guide(self.config), self.geometry, guidance_scale=scale)
        labels = equal_labels(self.config.eval.num_images, module.num_classes, SEED)
        index = np.arange(len(labels))[self.ranks.rank :: self.ranks.world]
        for start in range(0, len(index), BATCH):
            index_B = torch.as_tensor(index[start : start + BATCH], device=self.device)
            labels_B = torch.as_tensor(labels[index[start : start + BATCH]], device=self.device)
            yield self.features(sampler.draw(labels_B, index_B, SEED))

    def _moments(self, features: Iterator[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """(mean, covariance) over all ranks' features, on every rank."""
        moments = StreamingMoments(self.geometry.latent_shape[0])
        for features_BD in features:
            moments.update(features_BD)
        return moments.over(self.ranks).finish()
