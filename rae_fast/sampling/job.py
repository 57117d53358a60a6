"""Many images over many ranks, in files: goes on where it stopped, and gives the same bytes however it is divided.

Sample i is `images/<i>.png`; its pixels depend on the checkpoint, the settings, its label and (seed, i) alone.

    images/000000.png ...   labels.npy   sampling.json   grid.png
    samples.npz             if asked for: arr_0 uint8 [n, S, S, 3] as ADM's evaluator reads it, labels int64 [n]
    latents.npy|.zarr       if asked for: float32 [n, C, H, W], normalized
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rae_fast.autoencoder.rae import RAE
from rae_fast.config import Config
from rae_fast.config_file import to_yaml
from rae_fast.errors import UserError
from rae_fast.evaluation.images import save_grid, save_npz, save_png
from rae_fast.geometry import resolve_geometry
from rae_fast.progress import Progress
from rae_fast.provenance import atomic_write, sha256_file, versions
from rae_fast.runtime import Ranks, device_name, pick_device, set_precision
from rae_fast.sampling.division import STALL_S, Division, Writer, numbered
from rae_fast.sampling.folder import begin, read_images, remove_stale_parts
from rae_fast.sampling.latent_files import LatentFile
from rae_fast.sampling.sampler import EXACT_BATCH, LatentSampler, decode_images, draw_latents, load_sampler
from rae_fast.sampling.source import open_decoder
from rae_fast.training.restore import newest
from rae_fast.training.run_folder import share_threads

MANIFEST, LABELS = "sampling.json", "labels.npy"
GRID_IMAGES = 64
# What must agree between the run that began a folder and the one that goes on with it.
IDENTITY = (
    "checkpoint_sha256",
    "guide_sha256",
    "decoder_sha256",
    "statistics_sha256",
    "settings_sha256",
    "seed",
    "rows",
    "ema",
    "latents",
    "device_type",
)


@dataclass(frozen=True)
class SamplingJob:
    """What to draw and where to put it.

    Attributes:
        folder: gets everything.
        labels: int64 [n], class of each sample.
        seed: with the sample's number it decides the noise.
        npz: also pack all images.
        latents: npy or zarr to keep the latents too.
        batch: images that are dealt to a rank at a time; rounded up to whole pieces of `rows`, so that pixels do not
            depend on it.
        rows: samples computed at once; another number rounds differently.
        columns: of the grid; None: as square as can be.
        cuda_graphs: see `load_sampler`.
        ema: see `load_sampler`.
        stall_s: see `Division`.
    """

    folder: Path
    labels: np.ndarray
    seed: int = 0
    npz: bool = False
    latents: str | None = None
    batch: int = EXACT_BATCH
    rows: int = EXACT_BATCH
    columns: int | None = None
    cuda_graphs: bool = False
    ema: str | None = None
    stall_s: float = STALL_S


def run_sampling(config: Config, job: SamplingJob, ranks: Ranks) -> dict[str, Any]:
    """Draw what is missing of `job`; rank 0 then writes the grid and the archive. Returns the manifest.

    Ranks work on their own and meet only in the folder; see `division`.

    Raises:
        UserError: the folder holds samples of other weights, settings, labels or seed; a label is not a class.
    """
    _check_job(job)
    device = pick_device(config.runtime.device, ranks.local_rank)
    share_threads(ranks, device)
    set_precision(config.runtime.precision)
    geometry = resolve_geometry(config)
    sampler = load_sampler(
        config, geometry, device, rows=job.rows, cuda_graphs=job.cuda_graphs, ema=job.ema, say=ranks.is_main
    )
    _check_labels(job.labels, sampler)
    rae = open_decoder(config, device)
    manifest = _manifest(config, job, sampler, rae)
    latents = None
    if job.latents is not None:
        latents = LatentFile(job.folder, job.latents, (len(job.labels), *geometry.latent_shape))
    begin_samples(job.folder, manifest, job.labels, ranks, latents)
    try:
        draw_missing(sampler, rae, job, ranks, latents)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device_name(device)} has no room for {job.rows} samples at once",
            "fewer at once",
            f"set --rows {max(1, job.rows // 2)} and another --folder",
        ) from error
    if ranks.is_main:
        _finish(job)
    return manifest


def draw_missing(
    sampler: LatentSampler, rae: RAE, job: SamplingJob, ranks: Ranks, latents: LatentFile | None = None
) -> None:
    """Draw this rank's share of what is missing; on rank 0, return when everything is there."""
    images = job.folder / "images"
    unit = -(-job.batch // job.rows) * job.rows
    division = Division(len(job.labels), unit, ranks, lambda: numbered(images, ".png"), "sampling", stall_s=job.stall_s)
    with Writer() as writer:

        def make(index: np.ndarray) -> None:
            z_nCHW = draw_latents(sampler, job.labels[index], index, job.seed)
            if latents is not None:
                # Before the images: an image that is there says that its latent is.
                latents.write(index, z_nCHW)
            drawn = decode_images(rae, z_nCHW, sampler.rows)
            paths = [image_path(job.folder, int(i)) for i in index]
            writer.submit((save_png, pair) for pair in zip(paths, drawn, strict=True))

        division.work(make, writer.wait)


def image_path(folder: Path, i: int) -> Path:
    """Where sample `i` lies."""
    return folder / "images" / f"{i:06d}.png"


# --- what a folder is of --------------------------------------------------------------------------------------------


def begin_samples(
    folder: Path, manifest: dict[str, Any], labels: np.ndarray, ranks: Ranks, latents: LatentFile | None = None
) -> None:
    """Begin the folder with manifest, labels and an empty latent file, or check those that are there.

    Raises:
        UserError: the folder's samples are of something else, or rank 0 does not come.
    """

    def prepare() -> None:
        _check_stored_labels(folder, labels)
        remove_stale_parts(folder / "images")
        if latents is not None:
            latents.create()
        with atomic_write(folder / LABELS) as file:
            np.save(file, labels.astype(np.int64))

    def ready() -> bool:
        return len(_stored_labels(folder)) >= len(labels)

    begin(folder / MANIFEST, manifest, IDENTITY, ranks, prepare=prepare, ready=ready)
    _check_stored_labels(folder, labels)


def _check_stored_labels(folder: Path, labels: np.ndarray) -> None:
    kept = _stored_labels(folder)
    if len(kept) > len(labels) or not np.array_equal(kept, labels[: len(kept)]):
        raise UserError(
            f"{folder} holds {len(kept)} samples whose labels are not the first of these {len(labels)}",
            "the same labels, or more of them behind the same ones",
            "give another --folder, or remove this one",
        )


def _stored_labels(folder: Path) -> np.ndarray:
    path = folder / LABELS
    return np.load(path) if path.exists() else np.empty(0, np.int64)


def _manifest(config: Config, job: SamplingJob, sampler: LatentSampler, rae: RAE) -> dict[str, Any]:
    """What the images depend on, and with what they were made."""
    decoder = config.stage_1.ckpt or config.stage_1.params.pretrained_decoder_path
    guide = config.guidance.guidance_model
    assert config.stage_2.ckpt is not None and decoder is not None
    return {
        "samples": len(job.labels),
        "seed": job.seed,
        "rows": job.rows,
        "ema": job.ema,
        "latents": job.latents,
        "device_type": sampler.device.type,
        "device": device_name(sampler.device),
        "checkpoint": config.stage_2.ckpt,
        "checkpoint_sha256": weights_sha256(config.stage_2.ckpt),
        "guide_sha256": weights_sha256(guide.ckpt) if sampler.guide is not None and guide and guide.ckpt else None,
        "decoder": decoder,
        "decoder_sha256": sha256_file(decoder),
        "statistics_sha256": _statistics_sha256(rae),
        "settings_sha256": hashlib.sha256(_drawing_settings(config).encode()).hexdigest(),
        "labels_sha256": hashlib.sha256(np.ascontiguousarray(job.labels, "<i8").tobytes()).hexdigest(),
        "config": to_yaml(config),
        "versions": versions(),
    }


def weights_sha256(path: str | Path) -> str:
    """Digest of a file of weights; of a checkpoint folder, that of its manifest, which holds those of its files."""
    path = Path(path)
    return sha256_file(newest(path) / "manifest.json" if path.is_dir() else path)


def _statistics_sha256(rae: RAE) -> str:
    digest = hashlib.sha256(repr(rae.eps).encode())
    for tensor in (rae.latent_mean, rae.latent_var):
        digest.update(b"none" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _drawing_settings(config: Config) -> str:
    """The sections that decide the pixels; where files lie and how many workers there are does not."""
    guidance, runtime = config.guidance, config.runtime
    model = (config.stage_2.target, sorted(config.stage_2.params.items()))
    guided = (guidance.method, guidance.scale, guidance.t_min, guidance.t_max)
    computed = (runtime.precision, runtime.kernels, runtime.compile)
    return repr((model, config.sampler, guided, config.transport, config.misc, computed))


def _check_labels(labels: np.ndarray, sampler: LatentSampler) -> None:
    if len(labels) == 0:
        raise UserError("no samples were asked for", "a number above 0")
    outside = labels[(labels < 0) | (labels >= sampler.model.num_classes)]
    if len(outside):
        raise UserError(f"label {outside[0]}", f"a class from 0 to {sampler.model.num_classes - 1}")


def _check_job(job: SamplingJob) -> None:
    for flag, value in (("--batch", job.batch), ("--rows", job.rows), ("--columns", job.columns)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}", "a number above 0")
    check_seed(job.seed)


def check_seed(seed: int) -> None:
    """Refuse a seed that the counter-based generator cannot take.

    Raises:
        UserError: it is negative or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}", "a number from 0 to 4294967295")


# --- the end --------------------------------------------------------------------------------------------------------


def _finish(job: SamplingJob) -> None:
    """Grid and archive, from the files."""
    count = len(job.labels)
    shown = min(GRID_IMAGES, count)
    columns = job.columns or max(1, int(shown**0.5))
    save_grid(job.folder / "grid.png", np.concatenate(list(read_images(job.folder / "images", range(shown)))), columns)
    if job.npz:
        progress = Progress(count, "images", "packing samples.npz")

        def packed() -> Iterator[np.ndarray]:
            for images in read_images(job.folder / "images", range(count)):
                yield images
                progress.advance(len(images))

        save_npz(job.folder / "samples.npz", packed(), job.labels, count=count)
        progress.close()
