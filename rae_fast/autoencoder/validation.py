"""How well the decoder restores images that it was not trained on, without latent noise.

Shapes: B images of a batch, N held-out images of this rank, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rae_fast.autoencoder.feed import as_tokens
from rae_fast.autoencoder.losses import Lpips
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.images import save_grid, to_uint8
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.images.decode import ImagePipeline
from rae_fast.images.index import build_index
from rae_fast.latents.encode import LatentEncoder
from rae_fast.runtime import Ranks

BATCH = 64
GRID_IMAGES = 8
DIFFERENCE_GAIN = 4  # differences are small: make them visible in grids
METRICS = ("psnr", "ssim", "lpips")
AFTERWARDS = ("rfid",)  # needs tens of thousands of images to mean anything


@dataclass(frozen=True)
class HeldOut:
    """This rank's share of the held-out images, encoded once.

    Attributes:
        images_N3SS: uint8, on the CPU.
        tokens: latents before normalization, [B, tokens, C] for each batch of `BATCH` images, on the CPU.
        lpips: measures LPIPS too, if given.
    """

    images_N3SS: Tensor
    tokens: Sequence[Tensor]
    lpips: Lpips | None = None

    @torch.no_grad()
    def measure(
        self,
        decoder: nn.Module,
        to_pixels: Callable[[Tensor], Tensor],
        ranks: Ranks,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, float]:
        """psnr_db, ssim and lpips of the decoder's 8-bit images, means over the images of all ranks; collective."""
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for images, restored in self._restored(decoder, to_pixels, device, autocast):
            eight_bit = torch.from_numpy(to_uint8(restored)).permute(0, 3, 1, 2)
            sums[0] += len(images)
            sums[1] += psnr(eight_bit, images).sum().to(device)
            sums[2] += ssim(eight_bit, images).double().sum().to(device)
            if self.lpips is not None:
                distance = self.lpips(restored.clamp(0, 1), images.to(device).float() / 255)
                sums[3] += len(images) * distance.double()
        if ranks.world > 1:
            dist.all_reduce(sums)
        count, *totals = sums.tolist()
        names = ("psnr_db", "ssim", *(["lpips"] if self.lpips is not None else []))
        return {name: total / count for name, total in zip(names, totals, strict=False)}

    @torch.no_grad()
    def save_grid(
        self, path: Path, decoder: nn.Module, to_pixels: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        """Originals, reconstructions and their differences, one row each."""
        images, restored = next(self._restored(decoder, to_pixels, device, nullcontext))
        original = to_uint8(images[:GRID_IMAGES].float() / 255)
        decoded = to_uint8(restored[:GRID_IMAGES])
        difference = np.abs(original.astype(np.int16) - decoded.astype(np.int16)) * DIFFERENCE_GAIN
        rows = np.concatenate([original, decoded, difference.clip(0, 255).astype(np.uint8)])
        save_grid(path, rows, len(original))

    def _restored(
        self,
        decoder: nn.Module,
        to_pixels: Callable[[Tensor], Tensor],
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 originals on the CPU, and what the decoder makes of their latents on the device."""
        for images, tokens in zip(self.images_N3SS.split(BATCH), self.tokens, strict=True):
            with autocast():
                patches = decoder(tokens.to(device, non_blocking=True))
            yield images, to_pixels(patches.float())


def held_out_source(config: Config) -> str | None:
    """Where held-out images come from; None: nothing is evaluated."""
    return config.eval.data_path or config.data.val_source


def prepare_held_out(
    config: Config, encoder: LatentEncoder, image_size: int, ranks: Ranks, lpips: Lpips | None
) -> HeldOut | None:
    """Decode, crop and encode `eval.num_images` of the held-out images; None where the config names none.

    Raises:
        UserError: the source cannot be used, has no readable image, or a metric is unknown.
    """
    for name in config.eval.metrics:
        if name in AFTERWARDS and ranks.is_main:
            print(f"eval.metrics: {name} is not measured while training, only on the exported decoder", flush=True)
        elif name not in (*METRICS, *AFTERWARDS):
            raise UserError(f"eval.metrics holds {name!r}", f"some of {', '.join(METRICS)} in decoder training")
    source = held_out_source(config)
    if source is None:
        return None
    index = build_index(replace(config.data, source=source, limit=None))
    count = min(config.eval.num_images, len(index))
    if count < ranks.world:
        raise UserError(f"{source} holds {count} images", f"at least one for each of {ranks.world} ranks")
    positions = np.unique(np.linspace(0, len(index) - 1, count).round().astype(np.int64))
    pipeline = ImagePipeline(
        index, positions[ranks.rank :: ranks.world], image_size, config.data.crop, BATCH, threads=config.data.threads
    )
    images = torch.cat([batch.images_B3SS[batch.valid_B] for batch in pipeline])
    if not len(images):
        raise UserError(f"none of {count} images of {source} can be read", "readable held-out images")
    tokens = [as_tokens(encoder(part)).float().cpu() for part in images.split(BATCH)]
    return HeldOut(images, tokens, lpips if "lpips" in config.eval.metrics else None)
