"""How good the demo's models are: reconstruction, distance of distributions, and whether shapes are what was asked for.

Shapes: N images, S their side, D width of the encoder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Config
from rae_fast.demo.shape_classifier import class_agreement, train_classifier
from rae_fast.evaluation.features import mean_token
from rae_fast.evaluation.frechet import StreamingMoments, frechet_distance
from rae_fast.evaluation.images import save_grid, to_uint8
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.geometry import resolve_geometry
from rae_fast.images.decode import ImagePipeline
from rae_fast.images.index import build_index
from rae_fast.latents.store import LatentStore, open_store
from rae_fast.runtime import pick_device

BATCH = 64
PAIRS = 12
LEAST_REAL_AGREEMENT = 0.95


def evaluate_demo(config: Config, folder: Path, held_out: str) -> dict[str, Any]:
    """Measure the trained models on held-out images and on samples.npz; write reconstructions.png.

    Returns:
        psnr_db, ssim, frechet, class_agreement (None if the classifier is not good enough on real images),
        class_agreement_real, held_out_images.
    """
    device = pick_device(config.runtime.device)
    rae = build_rae(config.stage_1).to(device).eval()
    real, real_labels = _held_out_images(config, held_out)
    restored = _reconstruct(rae, real, device)
    _save_pairs(folder / "reconstructions.png", real, restored)
    samples = np.load(folder / "samples.npz")
    generated = torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2).contiguous()
    assert config.cache.path is not None
    store = open_store(config.cache.path)
    agreement, agreement_real = _agreement(store, real, real_labels, generated, torch.from_numpy(samples["labels"]))
    return {
        "psnr_db": round(float(psnr(restored, real).mean()), 3),
        "ssim": round(float(ssim(restored, real).mean()), 4),
        "frechet": round(_frechet(rae, store, generated, device), 3),
        "class_agreement": agreement,
        "class_agreement_real": agreement_real,
        "held_out_images": len(real),
    }


def _held_out_images(config: Config, held_out: str) -> tuple[Tensor, Tensor]:
    """Crops uint8 [N, 3, S, S] and labels int64 [N] of the images that no training saw."""
    index = build_index(replace(config.data, source=held_out, limit=None))
    size = resolve_geometry(config).image_size
    pipeline = ImagePipeline(index, np.arange(len(index)), size, config.data.crop, BATCH)
    images, labels = [], []
    for batch in pipeline:
        images.append(batch.images_B3SS[batch.valid_B].cpu())
        labels.append(torch.as_tensor(np.asarray(index.labels))[batch.positions_B[batch.valid_B]].long())
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def _reconstruct(rae: RAE, images_u8: Tensor, device: torch.device) -> Tensor:
    """Encoded and decoded again, uint8 [N, 3, S, S]."""
    restored = []
    for batch in images_u8.split(BATCH):
        decoded = rae.decode(rae.encode(batch.to(device).float() / 255))
        restored.append(torch.from_numpy(to_uint8(decoded)).permute(0, 3, 1, 2))
    return torch.cat(restored).contiguous()


def _save_pairs(path: Path, real: Tensor, restored: Tensor) -> None:
    """Originals above, reconstructions below, evenly spread over the held-out images."""
    chosen = torch.linspace(0, len(real) - 1, min(PAIRS, len(real))).long()
    both = torch.cat([real[chosen], restored[chosen]])
    save_grid(path, both.permute(0, 2, 3, 1).numpy(), len(chosen))


@torch.no_grad()
def _frechet(rae: RAE, store: LatentStore, generated: Tensor, device: torch.device) -> float:
    """Frechet distance of the encoder's mean patch token, generated images against the store's originals."""
    ours, theirs = (StreamingMoments(store.latent_shape[0]) for _ in range(2))
    for batch in generated.split(BATCH):
        ours.update(mean_token(rae.encode_raw(batch.to(device).float() / 255)))
    rows = np.flatnonzero(store.valid)
    for start in range(0, len(rows), BATCH):
        latents = store.read(rows[start : start + BATCH]).to(device)
        theirs.update(mean_token(rae.denormalize(latents)))
    return float(frechet_distance(*ours.finish(), *theirs.finish()))


def _agreement(
    store: LatentStore, real: Tensor, real_labels: Tensor, generated: Tensor, asked: Tensor
) -> tuple[float | None, float]:
    """Share of generated images that a grayscale classifier puts where it was asked; its share of real ones."""
    rows = np.flatnonzero(store.valid)
    classifier = train_classifier(store.read(rows, "pixels"), torch.as_tensor(store.labels[rows]).long())
    on_real = round(class_agreement(classifier, real, real_labels), 4)
    on_generated = round(class_agreement(classifier, generated, asked), 4)
    return (on_generated if on_real >= LEAST_REAL_AGREEMENT else None), on_real
