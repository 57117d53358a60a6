"""A store in other people's layouts: LightningDiT's safetensors shards, and plain .npy arrays.

Both hold the latents as the encoder gave them, before normalization, of the valid images only.

Shapes: N images, B a batch of them, C, H, W of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.latents.stats import save_statistics
from rae_fast.latents.store import LatentStore
from rae_fast.progress import Progress
from rae_fast.provenance import atomic_write

EXPORT_BATCH = 256
ROWS_A_FILE = 10_000  # of LightningDiT's own files, whose latents are 24 times smaller
FILE_BYTES = 1 << 30  # a file is gathered in memory
FORMATS = ("safetensors", "npy")
NAMES = {"original": "latents", "hflip": "latents_flip"}


def export(store: LatentStore, folder: Path, layout: str, *, show_progress: bool = False) -> int:
    """Write a store into a new folder; returns how many images that were.

    Args:
        store: a complete store.
        folder: made, or empty.
        layout: "safetensors" (LightningDiT: `latents`, `latents_flip`, `labels`, and `latents_stats.pt`) or "npy".
        show_progress: print progress.

    Raises:
        UserError: unknown layout, or a folder that holds something.
    """
    if layout not in FORMATS:
        raise UserError(f"layout {layout!r}", f"one of {', '.join(FORMATS)}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty", "a new or empty folder")
    rows = np.flatnonzero(store.valid)
    progress = Progress(len(rows), "images", f"export to {folder}", enabled=show_progress)
    writer = _write_safetensors if layout == "safetensors" else _write_npy
    writer(store, rows, folder, progress.advance)
    save_statistics(folder / "stat.pt", store.mean, store.var)
    progress.close()
    return len(rows)


def raw_latents(store: LatentStore, rows: np.ndarray, view: str) -> Tensor:
    """Latents before normalization, float32 [B, C, H, W]."""
    return store.denormalize(store.read(rows, view))


def channel_statistics(store: LatentStore) -> dict[str, Tensor]:
    """Mean and standard deviation per channel, [1, C, 1, 1]: LightningDiT's `latents_stats.pt`.

    Over positions p of equal count: mean = avg_p mean_p, var = avg_p (var_p + mean_p^2) - mean^2.
    """
    mean_CHW, var_CHW = store.mean.double(), store.var.double()
    mean_C = mean_CHW.mean((1, 2))
    var_C = (var_CHW + mean_CHW.square()).mean((1, 2)) - mean_C.square()
    return {"mean": mean_C.float()[None, :, None, None], "std": var_C.sqrt().float()[None, :, None, None]}


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _write_safetensors(store: LatentStore, rows: np.ndarray, folder: Path, advance: Callable[[int], None]) -> None:
    row_bytes = 4 * prod(store.latent_shape) * len(store.views)
    for number, part in enumerate(_batches(rows, max(1, min(ROWS_A_FILE, FILE_BYTES // row_bytes)))):
        tensors = {
            NAMES[view]: torch.cat([raw_latents(store, batch, view) for batch in _batches(part, EXPORT_BATCH)])
            for view in store.views
        }
        tensors["labels"] = torch.from_numpy(store.labels[part].astype(np.int64))
        facts = {"total_size": str(len(part)), "dtype": "torch.float32", "device": "cpu"}
        with atomic_write(folder / f"latents_rank00_shard{number:03d}.safetensors") as file:
            file.write(save(tensors, facts))
        advance(len(part))
    with atomic_write(folder / "latents_stats.pt") as file:
        torch.save(channel_statistics(store), file)


def _write_npy(store: LatentStore, rows: np.ndarray, folder: Path, advance: Callable[[int], None]) -> None:
    for view in store.views:
        with atomic_write(folder / f"{NAMES[view]}.npy") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), *store.latent_shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in _batches(rows, EXPORT_BATCH):
                file.write(raw_latents(store, batch, view).contiguous().numpy().data)
                advance(len(batch) if view == store.views[0] else 0)
    for name, content in (("labels", store.labels[rows].astype(np.int64)), ("rows", rows)):
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, content)
