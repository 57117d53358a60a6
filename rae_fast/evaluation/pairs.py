"""How close reconstructions are to their originals: PSNR, SSIM and LPIPS image by image, and rFID of the two sets.

Reconstructions are images in files, or what a config's autoencoder makes of the originals.

Shapes: N images, n of a piece, H and W their sides.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.autoencoder.losses import Lpips, find_vgg_weights, load_lpips
from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Config, Stage1
from rae_fast.errors import UserError, nearest
from rae_fast.evaluation.extractor import FEATURES, Extractor
from rae_fast.evaluation.feature_cache import Figures, FigureSet, collect
from rae_fast.evaluation.features import build_extractor, image_features
from rae_fast.evaluation.frechet import frechet_distance
from rae_fast.evaluation.image_sets import PIECE, ImageSet, open_images
from rae_fast.evaluation.images import to_uint8
from rae_fast.evaluation.inception import Inception
from rae_fast.evaluation.outcome import Picture, describe, picture_of, write_outcome
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.provenance import sha256_file
from rae_fast.runtime import Ranks, pick_device, set_precision

METRICS = ("psnr", "ssim", "lpips", "rfid")
SHOWN_PAIRS = 8
DIFFERENCE_GAIN = 4  # differences are small: make them visible


@dataclass(frozen=True)
class ReconstructionJob:
    """What to compare with what.

    Attributes:
        originals: .npz, folder, or store with pixels.
        restored: .npz or folder in the same order; None: what the config's autoencoder makes of the originals.
        metrics: some of METRICS.
        out: folder that gets report.json, report.html and pairs.png.
        cache: folder of figures by image.
        features: network of rFID: inception, encoder or `module:attribute`.
        image_size: side that the images of a folder of originals are cropped to.
        inception_weights: file; None: torch-fidelity's own place.
    """

    originals: str
    restored: str | None
    metrics: tuple[str, ...]
    out: Path
    cache: Path
    features: str = "inception"
    image_size: int | None = None
    inception_weights: str | None = None


class DecodedImages(ImageSet):
    """What an autoencoder makes of a set of images; made anew whenever it is read.

    Args:
        originals: what it encodes.
        stage1: names encoder, decoder weights and statistics.
        device: where it runs, in float32.

    Raises:
        UserError: weights are missing or do not fit, or no decoder weights are named.
    """

    kind = "autoencoder"

    def __init__(self, originals: ImageSet, stage1: Stage1, device: torch.device) -> None:
        decoder = stage1.ckpt or stage1.params.pretrained_decoder_path
        if decoder is None:
            raise UserError(
                "the config names no decoder weights",
                "--restored FILES, or a decoder",
                "set stage_1.params.pretrained_decoder_path=<file>",
            )
        self._originals, self._device = originals, device
        self._rae: RAE = build_rae(stage1).to(device).eval()
        statistics = stage1.params.normalization_stat_path
        encoder = {key: value for key, value in self._rae.encoder.identity().items() if key != "name"}
        self.identity = {
            "decoder": decoder,
            "decoder_sha256": sha256_file(decoder),
            "statistics_sha256": sha256_file(statistics) if statistics else None,
            "encoder": encoder,
        }
        self.source, self.count = f"{decoder} of {originals.source}", originals.count
        key = [originals.fingerprint, {k: v for k, v in self.identity.items() if k != "decoder"}]
        self.fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.size = next(self.pieces(0, 1)).shape[1:3]

    @torch.no_grad()
    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Encoded and decoded on exactly PIECE rows at a time."""
        for piece in self._originals.pieces(start, stop):
            padded = np.pad(piece, [(0, PIECE - len(piece)), (0, 0), (0, 0), (0, 0)], mode="edge")
            images = torch.from_numpy(padded).permute(0, 3, 1, 2).to(self._device).float() / 255
            yield to_uint8(self._rae(images))[: len(piece)]

    def facts(self) -> dict[str, Any]:
        return super().facts() | self.identity


def evaluate_reconstruction(job: ReconstructionJob, config: Config | None, ranks: Ranks) -> dict[str, Any] | None:
    """Measure the reconstructions and write the report; rank 0 returns it.

    Args:
        job: what to compare.
        config: names the autoencoder, if there are no files of reconstructions, and VGG's weights for LPIPS.
        ranks: this process among those that share the work.

    Raises:
        UserError: unknown metric, images or weights that are missing, or sets that do not pair up.
    """
    started_s = time.monotonic()
    config = config or Config()
    for name in job.metrics:
        if name not in METRICS:
            raise UserError(f"--metrics {name!r}{nearest(name, METRICS)}", f"some of {', '.join(METRICS)}")
    device = pick_device(config.runtime.device, ranks.local_rank)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    set_precision("fp32")
    extractor, lpips, identities = _networks(job, config, device)
    originals = open_images(job.originals, job.image_size)
    restored = open_images(job.restored) if job.restored else DecodedImages(originals, config.stage_1, device)
    _check_pairs(originals, restored)
    metrics: dict[str, dict[str, float]] = {}
    by_image = [name for name in job.metrics if name != "rfid"]
    pairs = collect(_pair_figures(originals, restored, by_image, lpips, identities, device), job.cache, ranks)
    if pairs is not None:
        metrics["pairs"] = {name: float(pairs.array(name).mean()) for name in pairs.names}
    if extractor is not None:
        found = [collect(image_features(images, extractor), job.cache, ranks) for images in (originals, restored)]
        if found[0] is not None and found[1] is not None:
            metrics[extractor.name] = _frechet(extractor, found[0], found[1])
    if pairs is None:
        return None
    report = {
        "kind": "reconstruction",
        "metrics": metrics,
        "samples": restored.facts(),
        "reference": originals.facts(),
        "pairs_sha256": pairs.content_sha256,
        "evaluators": identities,
        "notes": _notes(extractor, originals.count),
        **describe(ranks, device, started_s),
    }
    lead = f"{restored.source} against {originals.source}"
    write_outcome(job.out, report, "Reconstruction", lead, [_pairs_picture(originals, restored)])
    return report


def _networks(
    job: ReconstructionJob, config: Config, device: torch.device
) -> tuple[Extractor | None, Lpips | None, dict[str, Any]]:
    """What rFID and LPIPS need, before any image is read: a missing file must not cost an hour."""
    extractor, lpips, identities = None, None, {}
    if "rfid" in job.metrics:
        extractor = build_extractor(job.features, config, device, inception_weights=job.inception_weights)
        identities[extractor.name] = extractor.identity
    if "lpips" in job.metrics:
        lpips = load_lpips(config.gan.loss.lpips_weights).to(device)
        weights = find_vgg_weights(config.gan.loss.lpips_weights)
        assert weights is not None
        identities["lpips"] = {"network": "VGG16", "weights_sha256": sha256_file(weights)}
    return extractor, lpips, identities


def _check_pairs(originals: ImageSet, restored: ImageSet) -> None:
    if (originals.count, originals.size) != (restored.count, restored.size):
        shown = [f"{s.count} images of {s.size[1]}x{s.size[0]} ({s.source})" for s in (restored, originals)]
        raise UserError(f"{shown[0]} against {shown[1]}", "pairs", "crop both alike; --image-size crops the originals")


def _pair_figures(
    originals: ImageSet,
    restored: ImageSet,
    names: list[str],
    lpips: Lpips | None,
    identities: dict[str, Any],
    device: torch.device,
) -> Figures:
    def compute(start: int, stop: int) -> tuple[bytes, dict[str, np.ndarray]]:
        digest, parts = hashlib.sha256(), []
        for pair in zip(originals.pieces(start, stop), restored.pieces(start, stop), strict=True):
            for piece in pair:
                digest.update(piece.tobytes())
            original, again = (torch.from_numpy(piece.copy()).permute(0, 3, 1, 2).to(device) for piece in pair)
            parts.append(_of_pair(names, lpips, again, original))
        return digest.digest(), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    key = {
        "originals": originals.fingerprint,
        "restored": restored.fingerprint,
        "metrics": sorted(names),
        "lpips": identities.get("lpips"),
    }
    return Figures(key, originals.count, compute, "pairs")


def _of_pair(names: list[str], lpips: Lpips | None, restored: Tensor, original: Tensor) -> dict[str, np.ndarray]:
    """Figures [n] of uint8 images [n, 3, H, W]."""
    found: dict[str, Tensor] = {}
    if "psnr" in names:
        found["psnr_db"] = psnr(restored, original)
    if "ssim" in names:
        found["ssim"] = ssim(restored, original)
    if lpips is not None and "lpips" in names:
        found["lpips"] = lpips.distances(restored.float() / 255, original.float() / 255)
    return {name: value.double().cpu().numpy() for name, value in found.items()}


def _frechet(extractor: Extractor, originals: FigureSet, restored: FigureSet) -> dict[str, float]:
    name = "rfid" if isinstance(extractor, Inception) else "rfd"
    return {name: frechet_distance(*restored.moments(FEATURES), *originals.moments(FEATURES))}


def _notes(extractor: Extractor | None, count: int) -> list[str]:
    notes = []
    if extractor is not None and count < 10_000:
        notes.append(f"{count:,} images: rFID falls as their number grows; published ones use 50,000")
    if isinstance(extractor, Inception) and not extractor.identity["comparable_with_published"]:
        notes.append("these are not torch-fidelity's Inception weights: rFID compares with nothing published")
    return notes


def _pairs_picture(originals: ImageSet, restored: ImageSet) -> Picture:
    """Originals, reconstructions and their differences, one row each."""
    first, second = (picture_of(images, "", SHOWN_PAIRS).images for images in (originals, restored))
    difference = np.abs(first.astype(np.int16) - second.astype(np.int16)) * DIFFERENCE_GAIN
    rows = np.concatenate([first, second, difference.clip(0, 255).astype(np.uint8)])
    caption = f"Originals, reconstructions, and {DIFFERENCE_GAIN} times their differences; evenly spread"
    return Picture("pairs", rows, caption, len(first))
