"""What a build is going to make: the store's attributes, and whether it begins, goes on, or has nothing to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.images.entries import PathTable
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.layout import FORMAT, FORMAT_VERSION
from rae_fast.latents.sources import ImageSource
from rae_fast.latents.store import LatentStore, check_compatible
from rae_fast.provenance import sha256_file, versions

COMPUTED, GIVEN, NONE = "computed", "given", "none"
# What must agree between a config and a store for the one to continue or to use the other.
IDENTITY = (
    "precision",
    "latent_shape",
    "views",
    "codec",
    "shard_size",
    "pixels",
    "image_size",
    "crop",
    "normalization",
)


def cache_path(config: Config) -> str:
    """Where the store is.

    Raises:
        UserError: the config does not say.
    """
    if not config.cache.path:
        raise UserError("cache.path is not set", "the folder or URL of the latent store", "add cache.path=<folder>")
    return config.cache.path


def describe(config: Config, source: ImageSource, encoder: LatentEncoder) -> dict[str, Any]:
    """Attributes of the store that this config makes from these images.

    Raises:
        UserError: the encoder's latents are not of the size that the config implies, or a section contradicts another.
    """
    geometry = resolve_geometry(config)
    if encoder.latent_shape != geometry.latent_shape:
        raise UserError(
            f"the encoder makes latents of {list(encoder.latent_shape)}",
            f"{list(geometry.latent_shape)}, as the config says",
            "mend stage_1.params or misc.latent_size",
        )
    cache = config.cache
    if cache.shard_size < 1 or not cache.views:
        raise UserError(
            f"cache.shard_size is {cache.shard_size}, cache.views is {list(cache.views)}",
            "at least one image a shard and one view",
        )
    batch = cache.encode_batch or encoder.largest_batch(geometry.image_size, cache.shard_size)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "num_images": len(source),
        "latent_shape": list(encoder.latent_shape),
        "views": [view for view in ("original", "hflip") if view in cache.views],
        "codec": cache.codec,
        "shard_size": cache.shard_size,
        "pixels": geometry.image_size if cache.pixels else None,
        "image_size": geometry.image_size,
        "crop": config.data.crop,
        "encoder": encoder.identity(),
        "precision": cache.precision,
        "encode_batch": min(batch, cache.shard_size),
        "device": encoder.device.type,
        "normalization": normalization(config),
        "class_names": list(source.class_names),
        "dataset_digest": source.digest,
        "dataset": {
            "kind": source.kind,
            "source": source.source,
            "segments": [{"images": len(source), "digest": source.digest}],
        },
        "config": recipe(config),
        "versions": versions(),
    }


def normalization(config: Config) -> dict[str, Any]:
    """Where mean and variance come from: given in a file, computed over images, or none at all."""
    params, wanted = config.stage_1.params, config.cache.statistics
    if wanted == "none":
        return {"source": NONE, "eps": 0.0}
    if wanted == "compute":
        return {"source": COMPUTED, "images": config.cache.statistics_images, "eps": params.eps}
    path = statistics_path(config)
    if not Path(path).is_file():
        raise UserError(
            f"cache.statistics is {wanted!r}, and the file {path} does not exist",
            "compute, none, given (stage_1.params.normalization_stat_path), or the path of a stat.pt",
        )
    return {"source": GIVEN, "sha256": sha256_file(path), "eps": params.eps}


def statistics_path(config: Config) -> str:
    """The file of given statistics."""
    given = config.stage_1.params.normalization_stat_path
    return str(given if config.cache.statistics == "given" else config.cache.statistics)


def recipe(config: Config) -> dict[str, Any]:
    """The sections that a repair needs to make the same latents again, without where this store or others are."""
    sections = {"stage_1": asdict(config.stage_1), "data": asdict(config.data), "cache": asdict(config.cache)}
    del sections["cache"]["path"], sections["cache"]["also"]
    return sections


def identity(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that a config and a store must agree on."""
    return {**encoder_identity(attrs["encoder"]), **{name: attrs[name] for name in IDENTITY}}


def encoder_identity(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder is known by: its weights by their hash, wherever they lie."""
    return {f"encoder.{key}": value for key, value in encoder.items() if key not in ("name", "revision")}


def check_encoder(store: LatentStore, encoder: LatentEncoder) -> None:
    """Raises UserError unless this encoder made the store."""
    check_compatible(store, encoder_identity(encoder.identity()), "name the encoder that made it in stage_1.params")


def config_of(attrs: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config that a store was built with, as far as its bytes depend on it, and `key=value` overrides.

    Raises:
        UserError: an override that does not fit.
    """
    return load_config(attrs["config"], overrides)


def positions_by_path(stored: PathTable, source: ImageSource, where: str) -> np.ndarray:
    """Where in the source the image of each row of a store is, int64 [N].

    Raises:
        UserError: an image of the store is no longer in the source.
    """
    if np.array_equal(stored.offsets, source.paths.offsets) and np.array_equal(stored.blob, source.paths.blob):
        return np.arange(len(stored))  # nothing was appended: no table of a million names
    place = {path: position for position, path in enumerate(source.paths)}
    positions = np.fromiter((place.get(path, -1) for path in stored), np.int64, len(stored))
    lost = np.flatnonzero(positions < 0)
    if len(lost):
        raise UserError(
            f"{where} holds {len(lost)} images that {source.source} lacks, first {stored[int(lost[0])]}",
            "a source that has all images of the store",
            "mend data.source, or build another store with cache.path=<folder>",
        )
    return positions
