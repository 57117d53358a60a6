"""Images as files: eight-bit values, PNG, grids, .npz as evaluators read them.

Shapes: N images, H and W their sides.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.provenance import atomic_write

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Fixed, so that the same images make the same bytes.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def to_uint8(images_N3HW: Tensor) -> np.ndarray:
    """Clamp floats to [0, 1] and truncate 255 x to uint8 [N, H, W, 3], as the reference does."""
    scaled = images_N3HW.detach().float().clamp(0, 1) * 255
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_png(path: str | Path, image_HW3: np.ndarray) -> None:
    """Write one uint8 image, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG")
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def save_grid(path: str | Path, images_NHW3: np.ndarray, columns: int, *, margin: int = 2) -> None:
    """Write uint8 images of one size side by side, row by row, as one PNG."""
    assert len(images_NHW3) and columns > 0
    n, height, width, _ = images_NHW3.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    shape = (rows * (height + margin) - margin, columns * (width + margin) - margin, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images_NHW3):
        top, left = (i // columns) * (height + margin), (i % columns) * (width + margin)
        canvas[top : top + height, left : left + width] = image
    save_png(path, canvas)


def save_npz(
    path: str | Path,
    images: np.ndarray | Iterable[np.ndarray],
    labels: np.ndarray | None = None,
    *,
    count: int | None = None,
) -> None:
    """Write `arr_0` uint8 [N, H, W, 3], as ADM's evaluator reads it, and `labels` int64 [N]; atomically.

    Args:
        path: the .npz.
        images: all of them, or batches of them, which are written as they come.
        labels: class of each image.
        count: number of images, needed with batches.
    """
    if isinstance(images, np.ndarray):
        images, count = [images], len(images)
    assert count is not None
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", ZIP_DATE), "w", force_zip64=True) as member:
            written = 0
            for batch in images:
                assert batch.dtype == np.uint8 and batch.ndim == 4
                if not written:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *batch.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(batch).data)
                written += len(batch)
            assert written == count
        if labels is not None:
            with archive.open(zipfile.ZipInfo("labels.npy", ZIP_DATE), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64))


def list_images(folder: str | Path) -> list[Path]:
    """Image files of a folder and the folders in it, sorted by path.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "a folder of images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder} holds no image", f"files that end in {', '.join(SUFFIXES)}")
    return found
