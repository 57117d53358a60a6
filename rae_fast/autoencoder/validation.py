"""How well the decoder restores images that it was not trained on, without latent noise.

All figures are of 8-bit images, as `tools/evaluate.py reconstruction` takes them.

Shapes: B images of a batch, N held-out images of this rank, S pixels a side, D Inception features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rae_fast.autoencoder.batch import as_tokens
from rae_fast.autoencoder.losses import Lpips, load_lpips
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.frechet import StreamingMoments, frechet_distance
from rae_fast.evaluation.images import save_grid, to_uint8
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.images.decode import ImagePipeline
from rae_fast.images.index import build_index
from rae_fast.latents.encode import LatentEncoder
from rae_fast.runtime import Ranks

BATCH = 64
GRID_IMAGES = 8
DIFFERENCE_GAIN = 4  # differences are small: make them visible in grids
METRICS = ("psnr", "ssim", "lpips", "rfid")

Distance = Callable[[Tensor, Tensor], Tensor]  # uint8 [B, 3, S, S] twice -> [B]
Features = Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] -> [B, D]


@dataclass
class HeldOut:
    """This rank's share of the held-out images, encoded once.

    Attributes:
        images_N3SS: uint8, on the CPU.
        tokens: latents before normalization, [B, tokens, C] for each batch of `BATCH` images, on the CPU.
        distances: by name, whose means over images are reported.
        features: of Inception, for rFID; None: not measured.
    """

    images_N3SS: Tensor
    tokens: Sequence[Tensor]
    distances: Mapping[str, Distance] = field(default_factory=lambda: {"psnr_db": psnr, "ssim": ssim})
    features: Features | None = None
    _original: tuple[np.ndarray, np.ndarray] | None = None  # moments of the originals' features, once computed

    @torch.no_grad()
    def measure(
        self,
        decoder: nn.Module,
        to_pixels: Callable[[Tensor], Tensor],
        ranks: Ranks,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, float]:
        """Means of all distances, and rfid, over the held-out images of all ranks; collective."""
        sums = torch.zeros(1 + len(self.distances), dtype=torch.float64)
        restored_images = []
        for images, restored in self._restored(decoder, to_pixels, device, autocast):
            eight_bit = torch.from_numpy(to_uint8(restored)).permute(0, 3, 1, 2)
            distances = [distance(eight_bit, images).double().sum().cpu() for distance in self.distances.values()]
            sums += torch.stack([torch.tensor(len(images), dtype=torch.float64), *distances])
            if self.features is not None:
                restored_images.append(eight_bit)
        if ranks.world > 1:
            sums = sums.to(device)
            dist.all_reduce(sums)
        count, *totals = sums.tolist()
        found = {name: total / count for name, total in zip(self.distances, totals, strict=True)}
        if self.features is not None:
            if self._original is None:
                self._original = self._moments(self.images_N3SS.split(BATCH), ranks, device)
            found["rfid"] = frechet_distance(*self._original, *self._moments(restored_images, ranks, device))
        return found

    def _moments(self, batches: Iterable[Tensor], ranks: Ranks, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the features of all ranks' images."""
        assert self.features is not None
        features_ND = torch.cat([self.features(images.to(device)).cpu() for images in batches])
        moments = StreamingMoments(features_ND.shape[1])
        moments.update(features_ND)
        return moments.over(ranks).finish()

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


def prepare_held_out(
    config: Config, encoder: LatentEncoder | None, image_size: int, ranks: Ranks, perceptual: nn.Module | None
) -> HeldOut | None:
    """Decode, crop and encode `eval.num_images` of the held-out images; None where the config names none.

    Args:
        config: the whole configuration.
        encoder: the frozen encoder; present where there are held-out images.
        image_size: side of the crops.
        ranks: who takes part; each holds its share.
        perceptual: of the training; its LPIPS is used again.

    Raises:
        UserError: the source cannot be used or has no readable image, a metric is unknown, or its weights are missing.
    """
    for name in config.eval.metrics:
        if name not in METRICS:
            raise UserError(f"eval.metrics holds {name!r}", f"some of {', '.join(METRICS)} in decoder training")
    source = config.eval.data_path or config.data.val_source
    if source is None:
        if ranks.is_main and (config.eval.eval_interval or config.training.sample_every):
            print("neither eval.data_path nor data.val_source: training without evaluation and grids", flush=True)
        return None
    assert encoder is not None
    images = _read(config, source, image_size, ranks)
    tokens = [as_tokens(encoder(part)).float().cpu() for part in images.split(BATCH)]
    features = _features(config, encoder.device) if "rfid" in config.eval.metrics else None
    return HeldOut(images, tokens, _distances(config, encoder.device, perceptual), features)


def _read(config: Config, source: str, image_size: int, ranks: Ranks) -> Tensor:
    """This rank's share of `eval.num_images`, evenly spread over the source; uint8 [N, 3, S, S]."""
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
    return images


def _distances(config: Config, device: torch.device, perceptual: nn.Module | None) -> dict[str, Distance]:
    """The distances among `eval.metrics`, by the names of their figures."""
    found: dict[str, Distance] = {}
    for name in config.eval.metrics:
        if name == "psnr":
            found["psnr_db"] = psnr
        elif name == "ssim":
            found["ssim"] = ssim
        elif name == "lpips":
            lpips = perceptual if isinstance(perceptual, Lpips) else load_lpips(config.gan.loss.lpips_weights)
            found["lpips"] = _on_device(lpips.to(device), device)
    return found


def _on_device(lpips: Lpips, device: torch.device) -> Distance:
    def distance(restored_B3SS: Tensor, original_B3SS: Tensor) -> Tensor:
        restored, original = (images.to(device).float() / 255 for images in (restored_B3SS, original_B3SS))
        return lpips.distances(restored, original)

    return distance


def _features(config: Config, device: torch.device) -> Features:
    from rae_fast.evaluation.extractor import FEATURES
    from rae_fast.evaluation.features import build_extractor

    extractor = build_extractor(config.eval.features, config, device)
    return lambda images_B3SS: extractor(images_B3SS)[FEATURES]
