"""Frechet distances between generated and real samples while training, by the features of the evaluation tool.

    fd_latent    mean tokens, as `tools/evaluate.py generation --features encoder` takes them from a store: needs
                 neither pixels nor another network
    fid, fd      `eval.features` (Inception or another) of decoded samples against `eval.reference_npz_path`

Drawing is by (seed, sample index), sharded over ranks, and touches no random state of the training.

Shapes: B samples, C, H, W of a latent, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rae_fast.autoencoder.rae import RAE
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.extractor import FEATURES
from rae_fast.evaluation.feature_cache import collect
from rae_fast.evaluation.features import build_extractor, image_features, mean_token
from rae_fast.evaluation.frechet import StreamingMoments, frechet_distance
from rae_fast.evaluation.references import open_reference
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
Moments = tuple[np.ndarray, np.ndarray]  # mean [D], covariance [D, D]


@dataclass(frozen=True)
class Measure:
    """One distance.

    Attributes:
        name: its column in eval.jsonl.
        dim: D.
        features: normalized latents [B, C, H, W] -> [B, D].
        reference: moments of the real ones, on rank 0 at least; collective.
    """

    name: str
    dim: int
    features: Callable[[Tensor], Tensor]
    reference: Callable[[], Moments | None]


class OnlineEvaluation:
    """Evaluates an engine's EMA (and, with `eval.eval_model`, its online weights) into eval.jsonl.

    Args:
        config: sampler, number of images, features, reference.
        geometry: sizes.
        store: where real latents come from, or None.
        rae: decodes, for features of pixels, or None.
        folder: the run folder.
        ranks: who takes part.
        device: where this rank computes.
        start_step: steps done by earlier runs of this folder; later lines are cut off.

    Raises:
        UserError: reference or features are missing or do not fit together.
    """

    def __init__(
        self,
        config: Config,
        geometry: Geometry,
        store: LatentStore | None,
        folder: Path,
        ranks: Ranks,
        device: torch.device,
        start_step: int = 0,
        *,
        rae: RAE | None = None,
    ) -> None:
        self.config, self.geometry, self.ranks, self.device = config, geometry, ranks, device
        self.path = Path(folder) / FILE
        self.measures = [latent_measure(store, ranks, device)] if store is not None else []
        if config.eval.reference_npz_path and rae is not None:
            self.measures.append(pixel_measure(config, geometry, rae, self.path.parent / ".features", ranks, device))
        self._references: dict[str, Moments | None] = {}
        if ranks.is_main:
            truncate_log(self.path, start_step)

    def evaluate(self, engine: Engine, step: int, images: int) -> list[dict[str, Any]]:
        """One line for each set of weights, on rank 0, which writes them; collective."""
        for measure in self.measures:
            if measure.name not in self._references:
                self._references[measure.name] = measure.reference()
        lines = []
        for weights in ("ema", "online") if self.config.eval.eval_model else ("ema",):
            applied = engine.ema_applied() if weights == "ema" and engine.ema.labels else engine.online_applied()
            with applied as module:
                generated = self._generated(module)
            if self.ranks.is_main:
                distances = {}
                for name, moments in generated.items():
                    reference = self._references[name]
                    assert reference is not None
                    distances[name] = frechet_distance(*reference, *moments)
                facts = {**distances, "generated": self.config.eval.num_images}
                lines.append({"step": step, "images": images, "weights": weights, **facts})
        for line in lines:
            append_line(self.path, line)
        return lines

    @torch.no_grad()
    def _generated(self, module: nn.Module) -> dict[str, Moments]:
        """Moments of all ranks' generated samples, by measure."""
        from rae_fast.sampling import LatentSampler, draw_latents

        scale = training_guidance(self.config) if module.has_null_label else 1.0
        sampler = LatentSampler(module, without_guide(self.config), self.geometry, guidance_scale=scale)
        labels = spread_labels(self.config.eval.num_images, module.num_classes)
        index = np.arange(len(labels))[self.ranks.rank :: self.ranks.world]
        moments = {measure.name: StreamingMoments(measure.dim) for measure in self.measures}
        for start in range(0, len(index), BATCH):
            piece = index[start : start + BATCH]
            z_BCHW = draw_latents(sampler, labels[piece], piece, SEED)
            for measure in self.measures:
                moments[measure.name].update(measure.features(z_BCHW))
        return {name: found.over(self.ranks).finish() for name, found in moments.items()}


def spread_labels(count: int, classes: int) -> np.ndarray:
    """Labels int64 [count]: every class equally often, or one sample more; of more classes than samples, some."""
    return np.arange(count) * classes // count


def latent_measure(store: LatentStore, ranks: Ranks, device: torch.device) -> Measure:
    """Mean tokens against those of the store's valid rows: all, or a seeded subset."""

    def features(z_BCHW: Tensor) -> Tensor:
        return mean_token(store.denormalize(z_BCHW.float()))

    def stored() -> Iterator[Tensor]:
        rows = np.flatnonzero(store.valid)
        chosen = np.sort(rows[permutation(SEED, 0, len(rows))[:REFERENCE_IMAGES]])
        mine = chosen[ranks.rank :: ranks.world]
        view = "original" if "original" in store.views else store.views[0]
        for start in range(0, len(mine), BATCH):
            yield features(store.read(mine[start : start + BATCH], view).to(device))

    def reference() -> Moments:
        moments = StreamingMoments(store.latent_shape[0])
        for features_BD in stored():
            moments.update(features_BD)
        return moments.over(ranks).finish()

    return Measure("fd_latent", store.latent_shape[0], features, reference)


def pixel_measure(
    config: Config, geometry: Geometry, rae: RAE, cache: Path, ranks: Ranks, device: torch.device
) -> Measure:
    """`eval.features` of decoded samples against `eval.reference_npz_path`: ready statistics, or images.

    Raises:
        UserError: reference or weights are missing, or statistics of another network.
    """
    from rae_fast.sampling import decode_images

    source = config.eval.reference_npz_path
    assert source is not None
    extractor = build_extractor(config.eval.features, config, device)
    inception = config.eval.features == "inception"
    given = open_reference(source, geometry.image_size)
    if given.images is None and not (inception and FEATURES in given.statistics):
        raise UserError(
            f"eval.reference_npz_path={source} holds no images, and eval.features is {config.eval.features}",
            "images, or Inception's mu and sigma with eval.features=inception",
            "set eval.reference_npz_path=null to compare latents alone",
        )

    def features(z_BCHW: Tensor) -> Tensor:
        images_BHW3 = decode_images(rae, z_BCHW)
        return extractor(torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).contiguous())[FEATURES]

    def reference() -> Moments | None:
        if inception and FEATURES in given.statistics:
            return given.statistics[FEATURES]
        assert given.images is not None
        found = collect(image_features(given.images, extractor), cache, ranks)
        return found.moments(FEATURES) if found is not None else None

    dim = features(torch.zeros(1, *geometry.latent_shape, device=device)).shape[1]
    return Measure("fid" if inception else "fd", dim, features, reference)
