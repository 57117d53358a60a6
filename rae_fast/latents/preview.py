"""Latents as pictures: the three strongest directions among all tokens as red, green and blue.

Shapes: B images, C channels, H x W tokens, S side of a picture.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.latents.layout import PIXELS
from rae_fast.latents.plan import config_of, positions_by_path
from rae_fast.latents.sources import open_source
from rae_fast.latents.store import LatentStore

DEFAULT_SIDE = 128
LOW, HIGH = 0.01, 0.99  # quantiles that become black and full colour


def token_colours(z_BCHW: Tensor) -> Tensor:
    """First three principal components of all tokens, each stretched to [0, 1]: float32 [B, 3, H, W]."""
    tokens_NC = z_BCHW.permute(0, 2, 3, 1).flatten(0, 2).double()
    centered_NC = tokens_NC - tokens_NC.mean(0)
    # Eigenvectors of the covariance: C is small, the number of tokens is not.
    _, vectors_CC = torch.linalg.eigh(centered_NC.T @ centered_NC)
    directions_C3 = vectors_CC[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary; make the largest entry positive, so that pictures can be compared.
    peaks = directions_C3.gather(0, directions_C3.abs().argmax(0, keepdim=True))
    colours_N3 = centered_NC @ (directions_C3 * peaks.sign())
    low, high = (torch.quantile(colours_N3[:: max(1, len(colours_N3) // 100_000)], q, dim=0) for q in (LOW, HIGH))
    unit_N3 = ((colours_N3 - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    batch, _, height, width = z_BCHW.shape
    return unit_N3.float().reshape(batch, height, width, 3).permute(0, 3, 1, 2)


def preview(store: LatentStore, rows: np.ndarray, images_BSS3: np.ndarray | None = None) -> np.ndarray:
    """Pictures in turn, image (where there is one), then each view's latents: uint8 [B * P, S, S, 3].

    Args:
        store: a complete store.
        rows: which images.
        images_BSS3: their crops; None: the store's own pixels, if it has any.
    """
    if images_BSS3 is None and PIXELS in store.planes:
        images_BSS3 = store.read_pixels(rows).permute(0, 2, 3, 1).numpy()
    side = DEFAULT_SIDE if images_BSS3 is None else images_BSS3.shape[1]
    latents = torch.cat([store.read(rows, view) for view in store.views])
    enlarged = torch.nn.functional.interpolate(token_colours(latents), size=(side, side), mode="nearest")
    pictures = (enlarged * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    columns = [pictures[i * len(rows) : (i + 1) * len(rows)] for i in range(len(store.views))]
    if images_BSS3 is not None:
        columns.insert(0, images_BSS3)
    return np.stack(columns, axis=1).reshape(-1, side, side, 3)


def draw_preview(store: LatentStore, count: int) -> tuple[np.ndarray, int]:
    """Pictures of `count` images spread over the store, and how many of them belong in a row.

    The crops come from the store's pixels or from its source; if that is gone, latents are drawn alone, which is said.
    """
    rows = spread_rows(store, count)
    images = None
    if PIXELS not in store.planes:
        try:
            images = source_crops(store, rows)
        except UserError as error:
            print(f"no images beside the latents: {error}", file=sys.stderr)
    pictures = preview(store, rows, images)
    each = len(pictures) // len(rows)
    return pictures, each * max(1, round(len(rows) ** 0.5 / each**0.5))


def source_crops(store: LatentStore, rows: np.ndarray) -> np.ndarray:
    """Crops of these rows from the images that the store was built from, uint8 [B, S, S, 3].

    Raises:
        UserError: the source is gone, or lacks images of the store.
    """
    source = open_source(config_of(store.attrs), store.attrs["image_size"])
    positions = positions_by_path(store.paths, source, store.url)[rows]
    batches = [batch.images_B3SS for batch in source.decode(positions, torch.device("cpu"))]
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


def spread_rows(store: LatentStore, count: int) -> np.ndarray:
    """At most `count` valid rows, evenly spread over the store, ascending."""
    valid = np.flatnonzero(store.valid)
    return valid[np.unique(np.linspace(0, len(valid) - 1, min(count, len(valid))).astype(np.int64))]
