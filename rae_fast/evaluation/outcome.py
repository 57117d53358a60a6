"""What an evaluation leaves behind: report.json, the same as a page, and pictures of what was compared."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from rae_fast.evaluation.image_sets import PIECE, ImageSet
from rae_fast.evaluation.images import save_grid
from rae_fast.evaluation.report import Page
from rae_fast.provenance import versions, write_json
from rae_fast.runtime import Ranks, device_name

SHOWN = 32
COLUMNS = 8
LARGEST_SIDE = 128
MEASURING = ("numpy", "pillow", "torch-fidelity", "torchmetrics", "lpips")
# Figure -> how it is written, and what it is called.
TITLES = {
    "fid": ("FID", "{:.3f}"),
    "sfid": ("sFID", "{:.3f}"),
    "fd": ("Frechet distance", "{:.4g}"),
    "sfd": ("spatial Frechet distance", "{:.4g}"),
    "mmd2": ("MMD², unbiased", "{:.4g}"),
    "inception_score": ("inception score", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "psnr_db": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "rfid": ("rFID", "{:.3f}"),
    "rfd": ("reconstruction Frechet distance", "{:.4g}"),
}


class Picture(NamedTuple):
    """A grid: the name of its file, uint8 images [n, H, W, 3], what it shows, its columns."""

    name: str
    images: np.ndarray
    caption: str
    columns: int = COLUMNS


def describe(ranks: Ranks, device: torch.device, started_s: float) -> dict[str, Any]:
    """Versions, and what may differ between two runs of one command."""
    run = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started_s, 1),
        "ranks": ranks.world,
        "device": device_name(device),
    }
    return {"versions": versions(*MEASURING), "run": run}


def picture_of(images: ImageSet, name: str, shown: int = SHOWN) -> Picture:
    """Evenly spread images of a set, reduced to what a page needs."""
    chosen = np.unique(np.linspace(0, images.count - 1, min(shown, images.count)).round().astype(int))
    return Picture(
        name, np.stack([reduced(_image(images, int(row))) for row in chosen]), f"{len(chosen)} images, evenly spread"
    )


def reduced(image_HW3: np.ndarray) -> np.ndarray:
    """The image, made smaller if a side is above `LARGEST_SIDE`."""
    scale = LARGEST_SIDE / max(image_HW3.shape[:2])
    if scale >= 1:
        return image_HW3
    size = (round(image_HW3.shape[1] * scale), round(image_HW3.shape[0] * scale))
    return np.asarray(Image.fromarray(image_HW3).resize(size, Image.Resampling.LANCZOS))


def _image(images: ImageSet, row: int) -> np.ndarray:
    first = row - row % PIECE
    return next(images.pieces(first, min(first + PIECE, images.count)))[row - first]


def write_outcome(folder: Path, report: Mapping[str, Any], title: str, lead: str, pictures: Sequence[Picture]) -> None:
    """Write report.json, report.html and a PNG for each picture, atomically."""
    page = Page(title, lead)
    for evaluator, figures in report["metrics"].items():
        if len(report["metrics"]) > 1:
            page.heading(evaluator)
        page.tiles({TITLES[k][0]: TITLES[k][1].format(v) for k, v in figures.items() if k in TITLES})
    for note in report["notes"]:
        page.text(f"Note: {note}.")
    for picture in pictures:
        path = folder / f"{picture.name}.png"
        save_grid(path, picture.images, picture.columns)
        page.heading(picture.name.capitalize())
        page.image(path, picture.caption, pixels=picture.images.shape[1] < LARGEST_SIDE)
    page.heading("Figures")
    page.table(
        ("evaluator", "figure", "value"),
        [
            (evaluator, name, value)
            for evaluator, figures in report["metrics"].items()
            for name, value in figures.items()
        ],
    )
    page.heading("Made from")
    sections = ("samples", "made_by", "reference", "pairs_sha256", "evaluators", "versions", "run")
    page.facts(dict(_flat({name: report[name] for name in sections if report.get(name)}, "")))
    write_json(folder / "report.json", report)
    page.save(folder / "report.html")


def _flat(content: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in content.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
