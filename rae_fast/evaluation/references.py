"""What generated images are compared with: images, a store's latents, or ready-made statistics."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rae_fast.errors import UserError
from rae_fast.evaluation.extractor import FEATURES, SPATIAL
from rae_fast.evaluation.image_sets import ImageSet, StorePixels, is_store, open_images
from rae_fast.latents.store import LatentStore, open_store
from rae_fast.provenance import sha256_file

# Keys of ADM's reference batches: mean and covariance of Inception's pool_3, and of its spatial features.
STATISTICS = {FEATURES: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Reference:
    """One reference set, as far as it is there.

    Attributes:
        source: as the user named it.
        images: to extract features from, or None.
        store: latents that stand for the encoder's features, or None.
        statistics: feature name -> (mean [D], covariance [D, D]), float64.
        statistics_sha256: hash of the file that they came from.
    """

    source: str
    images: ImageSet | None = None
    store: LatentStore | None = None
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    statistics_sha256: str | None = None

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        facts: dict[str, Any] = {"source": self.source}
        if self.images is not None:
            facts |= self.images.facts()
        elif self.store is not None:
            facts |= {"kind": "latents", "images": int(self.store.valid.sum())}
        if self.statistics_sha256:
            facts["statistics_sha256"] = self.statistics_sha256
        return facts


def open_reference(source: str, image_size: int | None = None) -> Reference:
    """A reference set: ADM's .npz (`mu`, `sigma`, images, or both), a folder, or a latent store.

    Args:
        source: path or URL.
        image_size: crop the images of a folder to this side.

    Raises:
        UserError: there is nothing usable there.
    """
    if is_store(source):
        store = open_store(source)
        return Reference(source, StorePixels(store) if store.attrs["pixels"] else None, store)
    if not source.endswith(".npz"):
        return Reference(source, open_images(source, image_size))
    statistics = _read_statistics(Path(source))
    holds_images = not statistics or "arr_0" in _members(Path(source))
    return Reference(
        source,
        open_images(source) if holds_images else None,
        statistics=statistics,
        statistics_sha256=sha256_file(source) if statistics else None,
    )


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "an .npz with images or with mu and sigma") from error
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", "an intact .npz") from error


def _read_statistics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    members, found = _members(path), {}
    for name, (mean_key, covariance_key) in STATISTICS.items():
        if mean_key not in members or covariance_key not in members:
            continue
        try:
            with np.load(path) as file:
                mean, covariance = (np.asarray(file[key], np.float64) for key in (mean_key, covariance_key))
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read: {error}", "an intact .npz") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(f"{path}: {mean_key} {mean.shape}, {covariance_key} {covariance.shape}", "[D] and [D, D]")
        found[name] = (mean, covariance)
    return found
