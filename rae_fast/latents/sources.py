"""What a store is built from: images of an index, or the pixels that another store has kept.

The second makes several stores from one decode: build one with `cache.pixels`, then the others, for other encoders or
layers, with `cache.pixels_from` naming it; no JPEG is opened again.

Shapes: B images of a batch, S side of the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images.decode import Failure, ImageBatch, ImagePipeline
from rae_fast.images.drift import crop_drift
from rae_fast.images.entries import ImageIndex, PathTable
from rae_fast.images.index import build_index
from rae_fast.latents.layout import PIXELS
from rae_fast.latents.store import LatentStore, check_compatible, open_store

PIXEL_BATCH = 256
Decode = Callable[[np.ndarray, torch.device], Iterator[ImageBatch]]


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order, and how to get their crops.

    Attributes:
        paths: name of each image.
        labels: int64 [N].
        class_names: by label.
        kind, source: what it is, as the user wrote it.
        digest: another digest means other data.
        decode: (positions, device) -> batches of crops in that order, every position once.
        drift: how far its crops are from the reference's; called once, when a store begins.
    """

    paths: PathTable
    labels: np.ndarray
    class_names: Sequence[str]
    kind: str
    source: str
    digest: str
    decode: Decode
    drift: Callable[[torch.device], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.paths)


def open_source(config: Config, image_size: int) -> ImageSource:
    """The images that a config names.

    Raises:
        UserError: they cannot be had, or the store named by `cache.pixels_from` has no such crops.
    """
    if config.cache.pixels_from:
        return _from_store(config, image_size)
    return _from_index(build_index(config.data), config, image_size)


def _from_index(index: ImageIndex, config: Config, image_size: int) -> ImageSource:
    data = config.data

    def decode(positions: np.ndarray, device: torch.device) -> Iterator[ImageBatch]:
        return iter(
            ImagePipeline(
                index,
                positions,
                image_size,
                data.crop,
                data.batch_size,
                device,
                data.threads,
                hw_decoder_load=data.hw_decoder_load,
            )
        )

    def drift(device: torch.device) -> dict[str, Any]:
        return crop_drift(data.crop, index=index, image_size=image_size, device=device)

    return ImageSource(
        index.paths, index.labels, index.class_names, index.kind, index.source, index.digest, decode, drift
    )


def _from_store(config: Config, image_size: int) -> ImageSource:
    store = open_store(str(config.cache.pixels_from))
    if PIXELS not in store.planes:
        raise UserError(
            f"cache.pixels_from {store.url} was built without pixels", "a store built with cache.pixels=true"
        )
    check_compatible(
        store, {"image_size": image_size, "crop": config.data.crop}, "mend data.crop, data.image_size or the decoder's"
    )

    def decode(positions: np.ndarray, device: torch.device) -> Iterator[ImageBatch]:
        for first in range(0, len(positions), PIXEL_BATCH):
            yield _read_pixels(store, positions[first : first + PIXEL_BATCH], device)

    dataset = store.attrs["dataset"]
    return ImageSource(
        store.paths,
        store.labels.astype(np.int64),
        store.class_names,
        dataset["kind"],
        dataset["source"],
        store.attrs["dataset_digest"],
        decode,
        lambda device: store.attrs["crop_drift"],
    )


def _read_pixels(store: LatentStore, positions: np.ndarray, device: torch.device) -> ImageBatch:
    valid = torch.from_numpy(store.valid[positions])
    images = store.read_pixels(positions).to(device)
    reasons = {failure["index"]: failure["reason"] for failure in store.failures}
    failures = [
        Failure(int(row), store.paths[int(row)], reasons[int(row)]) for row in positions[~store.valid[positions]]
    ]
    return ImageBatch(torch.from_numpy(positions), images, valid, failures)
