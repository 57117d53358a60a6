"""Many images over many ranks, in files: resumes where it stopped, and gives the same bytes however it is divided.

Sample i is `images/<i>.png`; its pixels depend on the checkpoint, the settings, its label and (seed, i) alone. The
work is dealt in pieces of `EXACT_BATCH` consecutive samples; a piece whose files are all there is not drawn again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Config
from rae_fast.config_file import to_yaml
from rae_fast.errors import UserError
from rae_fast.evaluation.images import save_grid, save_npz, save_png
from rae_fast.geometry import resolve_geometry
from rae_fast.progress import Progress
from rae_fast.provenance import read_json, sha256_file, versions, write_json
from rae_fast.runtime import Ranks, barrier, init_distributed, pick_device, set_precision
from rae_fast.sampling import EXACT_BATCH, LatentSampler, draw_images, load_sampler

MANIFEST = "sampling.json"
GRID_IMAGES = 64
# What must agree between the run that began a folder and the one that goes on with it.
IDENTITY = ("checkpoint_sha256", "decoder_sha256", "settings_sha256", "labels_sha256", "seed")


@dataclass(frozen=True)
class SamplingJob:
    """What to draw and where to put it.

    Attributes:
        folder: gets images/, sampling.json, grid.png and, if asked for, samples.npz.
        labels: int64 [n], class of each sample.
        seed: with the sample's number it decides the noise.
        npz: also pack all images, `arr_0` uint8 [n, S, S, 3] and `labels`.
    """

    folder: Path
    labels: np.ndarray
    seed: int = 0
    npz: bool = False


def run_sampling(config: Config, job: SamplingJob, ranks: Ranks) -> dict[str, Any]:
    """Draw what is missing of `job`, then write the grid and the archive; returns the manifest.

    Raises:
        UserError: the folder holds samples of other weights, settings, labels or seed; a label is not a class.
    """
    device = pick_device(config.runtime.device, ranks.local_rank)
    set_precision(config.runtime.precision)
    init_distributed(ranks, device)
    geometry = resolve_geometry(config)
    sampler = load_sampler(config, geometry, device)
    _check_labels(job.labels, sampler)
    rae = build_rae(config.stage_1, need_encoder=False).to(device).eval()
    manifest = _manifest(config, job)
    if ranks.is_main:
        _begin(job.folder, manifest)
    barrier()
    _draw_missing(sampler, rae, job, ranks)
    barrier()
    if ranks.is_main:
        _finish(job)
    return manifest


def class_numbers(names: list[str], class_names: tuple[str, ...], num_classes: int) -> list[int]:
    """Class numbers for numbers or names.

    Raises:
        UserError: not a number below `num_classes`, and not the name of a class.
    """
    numbers = []
    for name in names:
        if name in class_names:
            numbers.append(class_names.index(name))
        elif name.isdigit() and int(name) < num_classes:
            numbers.append(int(name))
        else:
            known = ", ".join(class_names[:10]) or "no class names are known here"
            raise UserError(f"class {name!r}", f"a number below {num_classes} or a class name ({known})")
    return numbers


def _check_labels(labels: np.ndarray, sampler: LatentSampler) -> None:
    if len(labels) == 0:
        raise UserError("no samples were asked for", "a number above 0")
    outside = labels[(labels < 0) | (labels >= sampler.model.num_classes)]
    if len(outside):
        raise UserError(f"label {outside[0]}", f"a class from 0 to {sampler.model.num_classes - 1}")


def _manifest(config: Config, job: SamplingJob) -> dict[str, Any]:
    """What the images depend on, and with what they were made."""
    assert config.stage_2.ckpt is not None
    decoder = config.stage_1.params.pretrained_decoder_path or config.stage_1.ckpt
    settings = to_yaml(config)
    return {
        "samples": len(job.labels),
        "seed": job.seed,
        "checkpoint": config.stage_2.ckpt,
        "checkpoint_sha256": sha256_file(config.stage_2.ckpt),
        "decoder_sha256": sha256_file(decoder) if decoder else "",
        "settings_sha256": _digest(_drawing_settings(config).encode()),
        "labels_sha256": _digest(np.ascontiguousarray(job.labels, np.int64).tobytes()),
        "config": settings,
        "versions": versions(),
    }


def _drawing_settings(config: Config) -> str:
    """The sections that decide the pixels; where files lie and how many workers there are does not."""
    return repr((config.sampler, config.guidance, config.transport, config.misc, config.runtime.precision))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if path.exists():
        before = read_json(path)
        for key in IDENTITY:
            if before.get(key) != manifest[key]:
                raise UserError(
                    f"{folder} holds samples with {key} {before.get(key)}",
                    f"{manifest[key]}",
                    "give another --folder, or remove this one",
                )
    else:
        write_json(path, manifest)


def _draw_missing(sampler: LatentSampler, rae: RAE, job: SamplingJob, ranks: Ranks) -> None:
    pieces = [piece for number, piece in enumerate(_pieces(len(job.labels))) if number % ranks.world == ranks.rank]
    missing = [piece for piece in pieces if not all(image_path(job.folder, int(i)).exists() for i in piece)]
    total, left = sum(map(len, pieces)), sum(map(len, missing))
    progress = Progress(total, "images", "sampling", done=total - left, enabled=ranks.is_main)
    for index in missing:
        for i, image in zip(index, draw_images(sampler, rae, job.labels[index], index, job.seed), strict=True):
            save_png(image_path(job.folder, int(i)), image)
        progress.advance(len(index))
    progress.close()


def _pieces(total: int) -> Iterator[np.ndarray]:
    for start in range(0, total, EXACT_BATCH):
        yield np.arange(start, min(start + EXACT_BATCH, total))


def image_path(folder: Path, i: int) -> Path:
    """Where sample `i` lies."""
    return folder / "images" / f"{i:06d}.png"


def _finish(job: SamplingJob) -> None:
    """Grid and archive, from the files."""

    def images(count: int) -> Iterator[np.ndarray]:
        for i in range(count):
            with Image.open(image_path(job.folder, i)) as image:
                yield np.asarray(image)[None]

    shown = min(GRID_IMAGES, len(job.labels))
    save_grid(job.folder / "grid.png", np.concatenate(list(images(shown))), max(1, int(shown**0.5)))
    if job.npz:
        save_npz(job.folder / "samples.npz", images(len(job.labels)), job.labels, count=len(job.labels))
