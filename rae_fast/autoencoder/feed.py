"""What decoder training sees: un-normalized latents of clean images, and the pixels they came from.

Cached: both from the latent store, no JPEG and no encoder. Online: decode, random crop, and the encoder once.

Shapes: B images of one rank's micro-batch, N tokens of C channels, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.autoencoder.batch import DecoderBatch, as_tokens
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, resolve_geometry
from rae_fast.images.decode import RandomCrop
from rae_fast.images.entries import ImageIndex
from rae_fast.images.index import build_index
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.layout import PIXELS
from rae_fast.latents.loader import LatentLoader, loader_settings
from rae_fast.latents.online import OnlineLoader
from rae_fast.latents.plan import cache_path
from rae_fast.latents.store import LatentStore, check_compatible, open_store
from rae_fast.runtime import Ranks
from rae_fast.training.batching import BatchPlan

RESIZE_FACTOR = 1.5  # short side before a random crop, in crop sides; the reference resizes to 384 for 256


@dataclass(frozen=True)
class _HostBatch:
    """A batch as the producer thread leaves it, on the CPU."""

    stored: Tensor
    scales: Tensor | None
    images_B3SS: Tensor
    index_B: Tensor
    epoch: int


class CachedFeed(LatentLoader):
    """Latents and pixels of a store, in the loader's order; a flipped view comes with flipped pixels.

    Raises:
        UserError: the store has no pixels.
    """

    def __init__(
        self,
        store: LatentStore,
        config: Config,
        *,
        batch_size: int,
        images_per_step: int,
        seed: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        if PIXELS not in store.planes:
            raise UserError(
                f"{store.url} was built without pixels",
                "a store with cache.pixels=true",
                "build it anew with cache.pixels=true, or train with loader.source=online",
            )
        settings = loader_settings(config.loader)
        super().__init__(
            store, batch_size=batch_size, seed=seed, ranks=ranks, images_per_step=images_per_step, **settings
        )
        self.target = device
        eps = store.attrs["normalization"]["eps"]
        self._mean, self._std = store.mean.to(device), (store.var + eps).sqrt().to(device)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return {"dataset": self.store.attrs["dataset_digest"], "images": self.epoch_images, "views": self._views()}

    def _views(self) -> list[str]:
        return list(self.store.views) if self.flip else [self.store.views[0]]

    def _prepare(self, epoch: int, position: int) -> Iterator[_HostBatch]:
        pinned = self.target.type == "cuda"
        pixels = self.store.planes[PIXELS]
        for at_epoch, rows, which in self._batches(epoch, position):
            stored, scales = self._buffers(pinned)
            self._gather(rows, which, stored, scales)
            images = torch.empty(len(rows), *pixels.row_shape, dtype=torch.uint8, pin_memory=pinned)
            self._reader.gather(rows, [pixels], np.zeros(len(rows), np.int64), images.numpy(), None)
            flipped = torch.from_numpy(which == 1) if self.flip else torch.zeros(len(rows), dtype=torch.bool)
            images[flipped] = images[flipped].flip(-1)
            yield _HostBatch(stored, scales, images, torch.from_numpy(rows), at_epoch)

    def _deliver(self, batch: _HostBatch) -> DecoderBatch:
        stored, images, index_B = (
            part.to(self.target, non_blocking=True) for part in (batch.stored, batch.images_B3SS, batch.index_B)
        )
        scales = None if batch.scales is None else batch.scales.to(self.target, non_blocking=True)
        z_BCHW = self.store.codec.decode(stored, scales) * self._std + self._mean
        return DecoderBatch(as_tokens(z_BCHW), images.float() / 255, index_B, batch.epoch)


class OnlineFeed(OnlineLoader):
    """Decodes, crops (at random where `data.train_crop` says so) and encodes in every step, once."""

    def __init__(
        self,
        index: ImageIndex,
        encoder: LatentEncoder,
        config: Config,
        *,
        image_size: int,
        batch_size: int,
        images_per_step: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        unnormalized = torch.zeros(()), torch.ones(())
        super().__init__(
            index,
            encoder,
            *unnormalized,
            config,
            image_size=image_size,
            batch_size=batch_size,
            images_per_step=images_per_step,
            seed=seed,
            ranks=ranks,
        )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        shared = {"dataset": self.index.digest, "images": self.epoch_images, "flip": self.flip}
        return {**shared, "crop": [self.data.train_crop, self.data.random_resize]}

    def _random_crop(self, epoch: int) -> RandomCrop | None:
        if self.data.train_crop != "random":
            return None
        return RandomCrop(self.data.random_resize or round(RESIZE_FACTOR * self.image_size), self.seed, epoch)

    def _deliver(self, batch: Any) -> DecoderBatch:
        device = self.encoder.device
        images = batch.images_B3SS.to(device, non_blocking=True)
        index_B = batch.index_B.to(device, non_blocking=True)
        tokens_BNC = as_tokens(self.encoder(images).float())
        return DecoderBatch(tokens_BNC, images.float() / 255, index_B, batch.epoch)


# --- from a config --------------------------------------------------------------------------------------------------


def build_feed(
    config: Config, plan: BatchPlan, ranks: Ranks, device: torch.device, encoder: LatentEncoder | None
) -> CachedFeed | OnlineFeed:
    """The stream of latents and pixels that `loader.source` names.

    Raises:
        UserError: the store does not fit the config or has no pixels, or the images cannot be used.
    """
    geometry = resolve_geometry(config)
    shared = {
        "batch_size": plan.micro_batch,
        "images_per_step": plan.global_batch,
        "seed": config.training.global_seed,
        "ranks": ranks,
    }
    if config.loader.source == "online":
        assert encoder is not None
        index = build_index(config.data)
        return OnlineFeed(index, encoder, config, image_size=geometry.image_size, **shared)
    store = open_store(cache_path(config))
    check_store(store, geometry, encoder)
    return CachedFeed(store, config, device=device, **shared)


def check_store(store: LatentStore, geometry: Geometry, encoder: LatentEncoder | None) -> None:
    """Refuse a store of another encoder, latent size or image size.

    Raises:
        UserError: naming the attribute and both values.
    """
    expected: dict[str, object] = {"latent_shape": list(geometry.latent_shape), "image_size": geometry.image_size}
    if encoder is not None:
        # Weights are known by their hash, wherever they lie.
        identity = encoder.identity()
        expected |= {f"encoder.{key}": identity[key] for key in identity if key not in ("name", "revision")}
    check_compatible(store, expected)
