"""How far this machine's crops are from the reference's: measured, not assumed, and kept in the store's identity.

Measured on this project's drawn photographs: `exact` 0, everywhere; `fast` without a GPU 0 (it is `exact` there); with
one, what nvJPEG's inverse cosine transform and chroma upsampling differ by (with both set as in dali.py).
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from rae_fast.images.crop import center_crop_pil, pil_takes_tall_images_vertically
from rae_fast.images.decode import ImagePipeline
from rae_fast.images.entries import Entries, ImageIndex

IMAGES = 16
SIZES = ((500, 375), (375, 500), (640, 427), (333, 500), (1024, 768), (256, 256))
SUBSAMPLINGS = ("4:2:0", "4:2:2", "4:4:4")


def crop_drift(
    crop_mode: str,
    *,
    index: ImageIndex | None = None,
    image_size: int = 256,
    device: torch.device | str = "cpu",
    images: int = IMAGES,
) -> dict[str, Any]:
    """Compare crops of `crop_mode` on `device` with PIL's, in levels of 0..255.

    Args:
        crop_mode: `exact` or `fast`.
        index: the data to compare on, evenly spread; None for drawn photographs.
        image_size: side of the crops.
        device: where crops are made.
        images: how many are compared.

    Returns:
        mean_abs and max_abs difference, equal_share of values, images compared, the size, and what the reference was:
        Pillow's version and whether it resizes tall images vertically first.
    """
    index = index or _drawn_photographs(images)
    positions = np.unique(np.linspace(0, len(index) - 1, min(images, len(index))).astype(np.int64))
    compared, total, equal, largest = 0, 0, 0, 0
    for batch in ImagePipeline(index, positions, image_size, crop_mode, batch_size=images, device=device):
        for position, crop_3SS in zip(
            batch.positions_B[batch.valid_B].tolist(), batch.images_B3SS.cpu()[batch.valid_B], strict=True
        ):
            with Image.open(BytesIO(index.read(position))) as image:
                expected = np.asarray(center_crop_pil(image.convert("RGB"), image_size)).transpose(2, 0, 1)
            difference = np.abs(crop_3SS.numpy().astype(np.int64) - expected)
            compared += 1
            total += int(difference.sum())
            equal += int((difference == 0).sum())
            largest = max(largest, int(difference.max()))
    values = max(compared, 1) * 3 * image_size**2
    return {
        "mean_abs": round(total / values, 5),
        "max_abs": largest,
        "equal_share": round(equal / values, 5) if compared else None,
        "images": compared,
        "image_size": image_size,
        "pillow": PIL.__version__,
        "tall_images": "vertical pass first" if pil_takes_tall_images_vertically() else "horizontal pass first",
    }


class _Memory:
    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded

    def read(self, i: int) -> bytes:
        return self._encoded[i]


def _drawn_photographs(count: int) -> ImageIndex:
    """JPEGs of smooth colours with edges, always the same: sizes and chroma subsamplings in turn, quality 75 to 95."""
    random = np.random.default_rng(0)
    encoded, entries = [], Entries()
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        y, x = np.mgrid[:height, :width]
        pixels = smooth + np.where((x // 29 + y // 31) % 2, 30, -30)[..., None] + random.integers(-6, 7, smooth.shape)
        file = BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=75 + 5 * (number % 5), subsampling=SUBSAMPLINGS[number % len(SUBSAMPLINGS)]
        )
        encoded.append(file.getvalue())
        entries.add(f"drawn-{number}.jpg", 0, len(encoded[-1]))
    return entries.finish((), _Memory(encoded), kind="folder", source="drawn photographs")
