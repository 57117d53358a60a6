"""The loader's twin for those who stay online: decode, crop and encode in every step, with the same order and views.

Shapes: B images of one rank's micro-batch, C, H, W of a latent, S side of the crop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rae_fast import rng
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images.decode import ImageBatch, ImagePipeline, RandomCrop
from rae_fast.images.index import ImageIndex, build_index
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.loader import FLIP_PROBABILITY, BatchStream, LatentBatch
from rae_fast.latents.order import Order, choose_rows
from rae_fast.latents.plan import COMPUTED, NONE, normalization, statistics_path
from rae_fast.latents.stats import load_statistics
from rae_fast.latents.store import open_store
from rae_fast.runtime import Ranks


@dataclass(frozen=True)
class _DecodedBatch:
    """Crops as the producer thread leaves them, flipped where the view asks for it."""

    images_B3SS: Tensor
    index_B: Tensor
    epoch: int


class OnlineLoader(BatchStream):
    """Batches like those of `LatentLoader`, straight from the images.

    An image that cannot be read is replaced by the first readable one of its batch, and told about once.

    Args:
        index: the images; row i of a store of them is image i.
        encoder: the frozen encoder; encoding runs in the caller's thread and stream.
        mean, std: float32 [C, H, W], std with eps inside, to normalize by.
        config: its `data` and `loader` sections.
        image_size: side of the crop.
        batch_size, images_per_step, seed, ranks: as in `LatentLoader`.
    """

    def __init__(
        self,
        index: ImageIndex,
        encoder: LatentEncoder,
        mean: Tensor,
        std: Tensor,
        config: Config,
        *,
        image_size: int,
        batch_size: int,
        images_per_step: int | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        ranks, loader = ranks or Ranks(), config.loader
        rows = choose_rows(index.labels, np.ones(len(index), bool), loader.classes, index.source)
        order = Order(
            rows,
            index.labels[rows],
            seed,
            loader.shuffle,
            loader.block_size,
            loader.balanced,
            images_per_step or batch_size * ranks.world,
        )
        super().__init__(order, batch_size, ranks, loader.prefetch)
        self.index, self.encoder, self.data, self.image_size = index, encoder, config.data, image_size
        self.seed, self.flip = seed, loader.flip
        self._mean, self._std = mean.to(encoder.device), std.to(encoder.device)
        self._labels = torch.from_numpy(np.asarray(index.labels, np.int64))
        self._told: set[int] = set()

    def _prepare(self, epoch: int, position: int) -> Iterator[_DecodedBatch]:
        while True:
            rows = self.order.epoch(epoch)[position:].reshape(-1, self.ranks.world, self.batch_size)
            for batch in self._pipeline(epoch, rows[:, self.ranks.rank].reshape(-1)):
                yield self._decoded(batch, epoch)
            epoch, position = epoch + 1, 0

    def _pipeline(self, epoch: int, positions: np.ndarray) -> ImagePipeline:
        """Crops of these images in turn."""
        return ImagePipeline(
            self.index,
            positions,
            image_size=self.image_size,
            crop_mode=self.data.crop,
            batch_size=self.batch_size,
            device="cpu",
            threads=self.data.threads,
            hw_decoder_load=self.data.hw_decoder_load,
            random_crop=self._random_crop(epoch),
            gives_way=True,
        )

    def _random_crop(self, epoch: int) -> RandomCrop | None:
        """Draws of random crops; None for centre crops, which a diffusion transformer is trained on."""
        return None

    def _decoded(self, batch: ImageBatch, epoch: int) -> _DecodedBatch:
        images, index_B = batch.images_B3SS, batch.positions_B
        self._replace_failed(batch)
        if self.flip:
            flipped = rng.uniform(self.seed, epoch, index_B, rng.Stream.VIEW) < FLIP_PROBABILITY
            images[flipped] = images[flipped].flip(-1)
        return _DecodedBatch(images.pin_memory() if self.encoder.device.type == "cuda" else images, index_B, epoch)

    def _replace_failed(self, batch: ImageBatch) -> None:
        for failure in batch.failures:
            if failure.position not in self._told:
                self._told.add(failure.position)
                print(f"cannot read {failure.path}: {failure.reason}; another image takes its place", flush=True)
        if batch.failures and not bool(batch.valid_B.any()):
            raise UserError(
                f"none of {len(batch.valid_B)} images of a batch can be read, {batch.failures[0].path} for one",
                "readable images",
                "check data.source",
            )
        if batch.failures:
            batch.images_B3SS[~batch.valid_B] = batch.images_B3SS[batch.valid_B][:1]

    def _deliver(self, batch: _DecodedBatch) -> LatentBatch:
        device = self.encoder.device
        z_BCHW = (self.encoder(batch.images_B3SS).float() - self._mean) / self._std
        labels_B = self._labels[batch.index_B].to(device, non_blocking=True)
        return LatentBatch(z_BCHW, labels_B, batch.index_B.to(device, non_blocking=True), batch.epoch)


def open_online_loader(
    config: Config,
    *,
    image_size: int,
    batch_size: int,
    images_per_step: int | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
) -> OnlineLoader:
    """The online loader of a config, normalized by its statistics file or else by those of the store at `cache.path`.

    Raises:
        UserError: images, encoder or statistics cannot be had.
    """
    encoder = LatentEncoder(config.stage_1.params, config.cache.precision, torch.device(device))
    mean, std = online_statistics(config, encoder.latent_shape)
    return OnlineLoader(
        build_index(config.data),
        encoder,
        mean,
        std,
        config,
        image_size=image_size,
        batch_size=batch_size,
        images_per_step=images_per_step,
        seed=seed,
        ranks=ranks,
    )


def online_statistics(config: Config, latent_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(mean, sqrt(var + eps)) float32 [C, H, W] that latents are normalized by without a store of their own.

    Raises:
        UserError: the config asks for computed statistics, and there is no store that has them.
    """
    wanted = normalization(config)
    if wanted["source"] == NONE:
        return torch.zeros(latent_shape), torch.ones(latent_shape)
    if wanted["source"] == COMPUTED:
        if not config.cache.path:
            raise UserError(
                "loader.source is online, but there are no statistics to normalize by",
                "a stat.pt, or a store that has them",
                "set cache.statistics=<stat.pt>, or cache.path=<store>",
            )
        store = open_store(config.cache.path)
        return store.mean, (store.var + store.attrs["normalization"]["eps"]).sqrt()
    mean, var = load_statistics(statistics_path(config), latent_shape)
    return mean, (var + wanted["eps"]).sqrt()
