"""What the store serves against what the encoder gives today: the codec's whole error, and what it costs in pixels.

Shapes: B images of a batch, C, H, W of a latent, S side of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rae_fast.config import Config
from rae_fast.latents.build import Build
from rae_fast.latents.codecs import CodecError
from rae_fast.latents.encode import Unit
from rae_fast.latents.repair import repair_build
from rae_fast.latents.store import LatentStore
from rae_fast.runtime import Ranks

Decode = Callable[[Tensor], Tensor]  # normalized latents [B, C, H, W] -> images [B, 3, S, S] in [0, 1]
Distance = Callable[[Tensor, Tensor], Tensor]  # two image batches -> a number per image [B]


@dataclass
class Comparison:
    """Errors of stored latents against fresh ones.

    Attributes:
        images: how many were compared.
        errors: per view, `CodecError.report` over all of them.
        distances: per measure, the mean over images of decode(stored) against decode(fresh).
    """

    images: int
    errors: dict[str, dict[str, float | None]]
    distances: dict[str, float] = field(default_factory=dict)


def compare(
    store: LatentStore,
    config: Config,
    rows: np.ndarray,
    decode: Decode | None = None,
    measures: dict[str, Distance] | None = None,
) -> Comparison:
    """Encode rows afresh and compare them with what the store serves.

    Args:
        store: a complete store.
        config: how it was built, with a source that still has these images.
        rows: ascending, valid rows.
        decode: the decoder, to measure in pixels too.
        measures: names and distances between decoded images (PSNR, LPIPS).

    Raises:
        UserError: the encoder or the images are not those of the store.
    """
    build = repair_build(store, config, frozenset(store.views), Ranks())
    errors = {view: CodecError() for view in store.views}
    sums = dict.fromkeys(measures or {}, 0.0)
    for batch in build.encode(_units(build, rows)):
        taken = batch.unit.rows[batch.first :][: batch.count]
        for view in store.views:
            fresh = build.normalize(batch.planes[view]).cpu()[batch.valid_B]
            stored = store.read(taken[batch.valid_B.numpy()], view)
            if not len(stored):
                continue
            errors[view].update(fresh, stored)
            if decode is not None and view == store.views[0]:
                pair = decode(stored).clamp(0, 1), decode(fresh).clamp(0, 1)
                for name, measure in (measures or {}).items():
                    sums[name] += float(measure(*pair).sum())
    distances = {name: total / len(rows) for name, total in sums.items()}
    return Comparison(len(rows), {view: error.report() for view, error in errors.items()}, distances)


def _units(build: Build, rows: np.ndarray) -> list[Unit]:
    shard_size = build.attrs["shard_size"]
    return [Unit(int(shard), rows[rows // shard_size == shard]) for shard in np.unique(rows // shard_size)]
