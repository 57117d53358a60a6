"""Images through encoder and decoder, beside their originals, with figures; over many ranks, and resumable.

    originals/000000.png ...        the crops that were encoded
    reconstructions/000000.png ...  what the decoder makes of their latents
    figures/000000.json ...         PSNR, SSIM and, with VGG's weights, LPIPS of each image of a unit; or why it failed
    pairs.png   images.csv   metrics.json   and, if asked for, originals.npz and reconstructions.npz

Image i is the i-th of the source. A unit's figures are written last: they say that it is complete.

Shapes: B images of a unit, n of them readable, S side of the crop.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from rae_fast.autoencoder.losses import Lpips, find_vgg_weights, load_lpips
from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Config, Data
from rae_fast.errors import UserError
from rae_fast.evaluation.images import save_grid, save_npz, save_png, to_uint8
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.geometry import resolve_geometry
from rae_fast.images.decode import ImageBatch, ImagePipeline
from rae_fast.images.entries import Entries, ImageIndex
from rae_fast.images.folders import EXTENSIONS, FileReader
from rae_fast.images.index import build_index
from rae_fast.provenance import atomic_write, read_json, sha256_file, versions, write_json
from rae_fast.runtime import DTYPES, Ranks, device_name, pick_device, set_precision
from rae_fast.sampling.division import STALL_S, Division, Writer, numbered
from rae_fast.sampling.folder import begin, read_images, remove_stale_parts
from rae_fast.sampling.sampler import EXACT_BATCH, pieces
from rae_fast.training.previews import has_decoder
from rae_fast.training.run_folder import share_threads

MANIFEST = "reconstruction.json"
ORIGINALS, RESTORED, FIGURES = "originals", "reconstructions", "figures"
IDENTITY = (
    "dataset",
    "image_size",
    "crop",
    "encoder",
    "decoder_sha256",
    "statistics_sha256",
    "precision",
    "rows",
    "lpips",
)
MEASURES = ("psnr_db", "ssim", "lpips")
SHOWN_PAIRS = 8


@dataclass(frozen=True)
class ReconstructionJob:
    """What to reconstruct and where to put it.

    Attributes:
        sources: images, or one source of them: a folder, a list, tars, parquet files.
        folder: gets everything.
        npz: also pack originals and reconstructions.
        precision: of encoder and decoder.
        limit: only the first images.
        rows: images computed at once; another number rounds differently.
        stall_s: see `Division`.
    """

    sources: tuple[str, ...]
    folder: Path
    npz: bool = False
    precision: str = "fp32"
    limit: int | None = None
    rows: int = EXACT_BATCH
    stall_s: float = STALL_S


def run_reconstruction(config: Config, job: ReconstructionJob, ranks: Ranks) -> dict[str, Any] | None:
    """Reconstruct what is missing; rank 0 then writes figures, pairs and archives, and returns metrics.json's content.

    An image that cannot be read is left out, counted and named in images.csv.

    Raises:
        UserError: no images, no decoder weights, or a folder of other reconstructions.
    """
    for flag, value in (("--rows", job.rows), ("--limit", job.limit)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}", "a number above 0")
    if not has_decoder(config):
        raise UserError(
            "stage_1.params.pretrained_decoder_path is not set",
            "the weights of a trained decoder",
            "set it to <run of train_decoder>/export/model.pt or a released model.pt, or give --run",
        )
    index = index_of(job.sources, config.data, job.limit)
    device = pick_device(config.runtime.device, ranks.local_rank)
    share_threads(ranks, device)
    set_precision(job.precision)
    # The cache of algorithms found by trial may choose another one the next time.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    rae = build_rae(config.stage_1).to(device).eval().requires_grad_(False)
    lpips = _lpips(config, device, say=ranks.is_main)
    manifest = _manifest(config, job, index, rae, device, lpips)
    begin(job.folder / MANIFEST, manifest, IDENTITY, ranks)
    if ranks.is_main:
        for name in (ORIGINALS, RESTORED, FIGURES):
            remove_stale_parts(job.folder / name)
    reconstruct_missing(rae, lpips, index, config, job, ranks)
    return _finish(job, index, manifest) if ranks.is_main else None


def index_of(sources: Sequence[str], data: Data, limit: int | None = None) -> ImageIndex:
    """The images named: files, or one source of the kinds that a cache is built from.

    Raises:
        UserError: several sources that are not all images, or one that cannot be used.
    """
    if all(Path(source).suffix.lower() in EXTENSIONS for source in sources):
        entries = Entries()
        for source in sources:
            path = Path(source)
            if not path.is_file():
                raise UserError(f"{source} does not exist", "an image")
            entries.add(str(path.resolve()), 0, path.stat().st_size)
        reader = FileReader(Path("/"))
        index = entries.finish((), reader, kind="files", source=" ".join(sources))
        reader.paths = index.paths
        return index if limit is None else index.first(limit)
    if len(sources) > 1:
        raise UserError(f"{len(sources)} sources that are not all images", "images, or one folder or list")
    return build_index(replace(data, source=sources[0], kind="auto", limit=limit))


def reconstruct_missing(
    rae: RAE, lpips: Lpips | None, index: ImageIndex, config: Config, job: ReconstructionJob, ranks: Ranks
) -> None:
    """Reconstruct this rank's share of what is missing; on rank 0, return when everything is there."""
    # Figures of failures count once they are of this run: a file that was mended since is tried again.
    started_s = psutil.Process().create_time()
    settled: dict[int, set[int]] = {}

    def finished() -> set[int]:
        for first in numbered(job.folder / FIGURES, ".json") - settled.keys():
            if images := _images_of(job.folder, first, started_s):
                settled[first] = images
        return set().union(*settled.values())

    division = Division(len(index), job.rows, ranks, finished, "reconstructing", stall_s=job.stall_s)
    crops = _Crops(index, config, job, division.missing(), rae.pixel_mean.device)
    with Writer() as writer:

        def make(unit: np.ndarray) -> None:
            batch = crops.take(unit)
            originals_n3SS = batch.images_B3SS[batch.valid_B.to(batch.images_B3SS.device)]
            restored_n3SS, figures = restore(rae, lpips, originals_n3SS, job.rows, DTYPES[job.precision])
            numbers = batch.positions_B[batch.valid_B].tolist()
            tasks = []
            for name, images in ((ORIGINALS, originals_n3SS), (RESTORED, restored_n3SS)):
                images_nSS3 = images.permute(0, 2, 3, 1).cpu().numpy()
                tasks += [
                    (save_png, (job.folder / name / f"{i:06d}.png", image))
                    for i, image in zip(numbers, images_nSS3, strict=True)
                ]
            records = [{"number": i, "path": index.paths[i], **f} for i, f in zip(numbers, figures, strict=True)]
            records += [{"number": f.position, "path": f.path, "failed": f.reason} for f in batch.failures]
            place = job.folder / FIGURES / f"{int(unit[0]):06d}.json"
            writer.submit(tasks, then=lambda: write_json(place, sorted(records, key=lambda r: r["number"])))

        division.work(make, writer.wait)
    crops.close()


@torch.no_grad()
def restore(
    rae: RAE, lpips: Lpips | None, images_n3SS: Tensor, rows: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[dict[str, float]]]:
    """(reconstructions uint8 [n, 3, S, S], figures of each) of uint8 images; always `rows` rows at a time.

    The figures are those of the 8-bit images, as they are kept.
    """
    restored, figures = [images_n3SS[:0]], []
    for piece, padded in pieces(len(images_n3SS), rows):
        originals = images_n3SS[torch.as_tensor(padded, device=images_n3SS.device)]
        with torch.autocast(originals.device.type, dtype, enabled=dtype != torch.float32):
            decoded = rae(originals.float() / 255)
        again = torch.from_numpy(to_uint8(decoded)).permute(0, 3, 1, 2).contiguous().to(originals.device)
        values = {"psnr_db": psnr(again, originals), "ssim": ssim(again, originals)}
        if lpips is not None:
            values["lpips"] = lpips.distances(again.float() / 255, originals.float() / 255)
        columns = {name: value[: len(piece)].double().cpu().tolist() for name, value in values.items()}
        figures += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        restored.append(again[: len(piece)])
    return torch.cat(restored), figures


class _Crops:
    """Crops of units: read ahead over all units that this rank expects to make, one by one for others."""

    def __init__(
        self,
        index: ImageIndex,
        config: Config,
        job: ReconstructionJob,
        expected: Sequence[np.ndarray],
        device: torch.device,
    ) -> None:
        self._index, self._config, self._rows, self._device = index, config, job.rows, device
        self._expected = [int(unit[0]) for unit in expected]
        self._ahead = self._batches(np.concatenate(expected)) if expected else iter(())

    def take(self, unit: np.ndarray) -> ImageBatch:
        if self._expected and self._expected[0] == int(unit[0]):
            self._expected.pop(0)
            return next(self._ahead)
        return next(self._batches(unit))

    def close(self) -> None:
        self._ahead = iter(())

    def _batches(self, positions: np.ndarray) -> Iterator[ImageBatch]:
        size, data = resolve_geometry(self._config).image_size, self._config.data
        # Units are consecutive rows of one size, the last one excepted: each is one batch.
        return iter(
            ImagePipeline(self._index, positions, size, data.crop, self._rows, self._device, threads=data.threads)
        )


def _images_of(folder: Path, first: int, started_s: float) -> set[int]:
    """Images of a unit that is complete; none where figures of an earlier run tell of failures."""
    path = folder / FIGURES / f"{first:06d}.json"
    records = read_json(path)
    stale = path.stat().st_mtime < started_s and any("failed" in record for record in records)
    return set() if stale else {record["number"] for record in records}


def _lpips(config: Config, device: torch.device, *, say: bool) -> Lpips | None:
    if find_vgg_weights(config.gan.loss.lpips_weights) is not None:
        return load_lpips(config.gan.loss.lpips_weights).to(device)
    if config.gan.loss.lpips_weights is not None:
        load_lpips(config.gan.loss.lpips_weights)  # says what is wrong with the file that was named
    if say:
        print("LPIPS is not measured: no VGG16 weights (gan.loss.lpips_weights=<file>)", file=sys.stderr, flush=True)
    return None


def _manifest(
    config: Config, job: ReconstructionJob, index: ImageIndex, rae: RAE, device: torch.device, lpips: Lpips | None
) -> dict[str, Any]:
    decoder = config.stage_1.ckpt or config.stage_1.params.pretrained_decoder_path
    statistics = config.stage_1.params.normalization_stat_path
    assert decoder is not None and rae.encoder is not None
    return {
        "images": len(index),
        "source": index.source,
        "dataset": index.digest,
        "image_size": resolve_geometry(config).image_size,
        "crop": config.data.crop,
        "encoder": {key: value for key, value in rae.encoder.identity().items() if key not in ("name", "revision")},
        "decoder": decoder,
        "decoder_sha256": sha256_file(decoder),
        "statistics_sha256": sha256_file(statistics) if statistics else None,
        "precision": job.precision,
        "rows": job.rows,
        "lpips": lpips is not None,
        "device": device_name(device),
        "versions": versions(),
    }


def _finish(job: ReconstructionJob, index: ImageIndex, manifest: dict[str, Any]) -> dict[str, Any]:
    """images.csv, metrics.json, pairs.png and the archives, from the files."""
    records = [
        record
        for first in sorted(numbered(job.folder / FIGURES, ".json"))
        for record in read_json(job.folder / FIGURES / f"{first:06d}.json")
    ]
    good = [record for record in records if "failed" not in record]
    measures = [name for name in MEASURES if any(name in record for record in good)]
    with atomic_write(job.folder / "images.csv", "w") as file:
        table = csv.DictWriter(file, ["number", "path", *measures, "failed"], lineterminator="\n")
        table.writeheader()
        table.writerows(records)
    if not good:
        raise UserError(
            f"none of {len(records)} images of {index.source} can be read", "images", f"{records[0]['failed']}"
        )
    means = {name: float(np.mean([record[name] for record in good])) for name in measures}
    metrics = {**means, "images": len(good), "failed": len(records) - len(good), "made_by": manifest}
    write_json(job.folder / "metrics.json", metrics)
    numbers = [record["number"] for record in good]
    _save_pairs(job.folder, numbers[:SHOWN_PAIRS])
    if job.npz:
        labels = index.labels[numbers] if index.num_classes > 1 else None
        for name in (ORIGINALS, RESTORED):
            save_npz(job.folder / f"{name}.npz", read_images(job.folder / name, numbers), labels, count=len(numbers))
    return metrics


def _save_pairs(folder: Path, numbers: list[int]) -> None:
    """Originals above, reconstructions below."""
    rows = [image for name in (ORIGINALS, RESTORED) for image in read_images(folder / name, numbers)]
    save_grid(folder / "pairs.png", np.concatenate(rows), len(numbers))
