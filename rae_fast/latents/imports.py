"""A store from latents that others have computed: LightningDiT's safetensors shards, or .npy arrays.

It is built like any other, in shards that survive a crash; only that its latents come from files instead of an encoder.

Shapes: N images, B rows of a batch, C, H, W of a latent.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images.entries import PathTable
from rae_fast.latents.build import Build
from rae_fast.latents.encode import NOT_FINITE, RawBatch, Unit
from rae_fast.latents.exports import NAMES
from rae_fast.latents.layout import FORMAT, FORMAT_VERSION
from rae_fast.latents.plan import cache_path, identity, normalization, recipe
from rae_fast.latents.storage import open_storage
from rae_fast.latents.store import check_compatible, create_store, open_store, read_attributes
from rae_fast.latents.writer import BuildReport, begin_place, refuse_foreign, run_build, stop_on_sigterm
from rae_fast.provenance import versions
from rae_fast.runtime import Ranks

IMPORTED = "imported latents"
IMPORT_BATCH = 64


@dataclass(frozen=True)
class LatentFiles:
    """Files of latents, one after the other.

    Attributes:
        files: in the order of their rows.
        counts: rows of each.
        views: which views they have.
        latent_shape: [C, H, W].
        labels: int64 [N].
    """

    files: tuple[Path, ...]
    counts: tuple[int, ...]
    views: tuple[str, ...]
    latent_shape: tuple[int, ...]
    labels: np.ndarray

    def read(self, rows: np.ndarray, view: str) -> Tensor:
        """Latents of ascending rows as they are in the files, float32 [B, C, H, W]."""
        starts = [0, *accumulate(self.counts)]
        parts = []
        row, last = int(rows[0]), int(rows[-1]) + 1
        while row < last:
            number = bisect_right(starts, row) - 1
            end = min(last, starts[number + 1])
            parts.append(_read_slice(self.files[number], view, row - starts[number], end - starts[number]))
            row = end
        return torch.cat(parts)[torch.from_numpy(rows - int(rows[0]))].float()

    def names(self) -> list[str]:
        """A name for each row: its file and its place there."""
        pairs = zip(self.files, self.counts, strict=True)
        return [f"{file.name}#{row}" for file, count in pairs for row in range(count)]

    def digest(self) -> str:
        """Another digest means other data: names, sizes and labels."""
        sizes = [(file.name, file.stat().st_size) for file in self.files]
        return hashlib.sha256(repr(sizes).encode() + self.labels.astype("<i8").tobytes()).hexdigest()


def open_files(folder: Path) -> LatentFiles:
    """The latents in a folder: `*.safetensors` in LightningDiT's layout, or `latents.npy` and `labels.npy`.

    Raises:
        UserError: there are none, or they contradict one another.
    """
    if (folder / "latents.npy").is_file():
        return _open_npy(folder)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise UserError(
            f"{folder} has no latents", "*.safetensors with `latents` and `labels`, or latents.npy and labels.npy"
        )
    shapes, labels, views = [], [], set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                shapes.append(tuple(content.get_slice("latents").get_shape()))
                labels.append(content.get_tensor("labels").long().numpy())
                views.add(tuple(view for view, name in NAMES.items() if name in content.keys()))  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}", "tensors `latents` and `labels`") from error
        if len(labels[-1]) != shapes[-1][0]:
            raise UserError(f"{file} has {len(labels[-1])} labels for {shapes[-1][0]} latents", "one for each")
    if len({shape[1:] for shape in shapes}) > 1 or len(views) > 1:
        raise UserError(f"the files in {folder} differ in shape or views", "the same in all of them")
    counts = tuple(shape[0] for shape in shapes)
    return LatentFiles(files, counts, views.pop(), shapes[0][1:], np.concatenate(labels))


def _open_npy(folder: Path) -> LatentFiles:
    latents = np.load(folder / "latents.npy", mmap_mode="r")
    labels = np.zeros(len(latents), np.int64)
    if (folder / "labels.npy").is_file():
        labels = np.load(folder / "labels.npy").astype(np.int64)
    if latents.ndim != 4 or labels.shape != (len(latents),):
        raise UserError(
            f"{folder}: latents.npy has shape {latents.shape}, labels.npy {labels.shape}", "[N, C, H, W] and [N]"
        )
    views = tuple(view for view, name in NAMES.items() if (folder / f"{name}.npy").is_file())
    return LatentFiles((folder / "latents.npy",), (len(latents),), views, latents.shape[1:], labels)


def _read_slice(file: Path, view: str, first: int, last: int) -> Tensor:
    if file.suffix == ".npy":
        array = np.load(file.with_name(f"{NAMES[view]}.npy"), mmap_mode="r")[first:last]
        return torch.from_numpy(np.array(array, np.float32))
    with safe_open(file, framework="pt") as content:
        return content.get_slice(NAMES[view])[first:last]


def import_latents(folder: str | Path, config: Config, encoder_name: str = IMPORTED) -> BuildReport:
    """Build the store of `cache.path` from a folder of latents; codec, shard size and statistics as configured.

    Raises:
        UserError: no latents there, or a store at `cache.path` that does not match.
    """
    files = open_files(Path(folder))
    storage = open_storage(cache_path(config))
    wanted = describe_import(files, Path(folder), config, encoder_name)
    if read_attributes(storage) is None:
        refuse_foreign(storage)
    ranks = Ranks()
    with stop_on_sigterm() as stop:

        def prepare() -> Build | None:
            if read_attributes(storage) is None:
                begin_place(config, storage, wanted)
                create_store(storage, wanted, PathTable.of(files.names()), files.labels)
            store = open_store(storage.url, allow_incomplete=True)
            check_compatible(store, {**identity(wanted), "dataset_digest": wanted["dataset_digest"]})
            if store.complete:
                return None
            return Build(ranks, storage, store.attrs, partial(import_units, files, store.attrs), stop=stop)

        return run_build(storage, ranks, prepare)


def describe_import(files: LatentFiles, folder: Path, config: Config, encoder_name: str) -> dict[str, Any]:
    """Attributes of a store of imported latents; what nobody knows is null."""
    nothing = dict.fromkeys(("revision", "weights_sha256", "layers", "final_norm", "input_size", "resize"))
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "num_images": len(files.labels),
        "latent_shape": list(files.latent_shape),
        "views": list(files.views),
        "codec": config.cache.codec,
        "shard_size": config.cache.shard_size,
        "pixels": None,
        "image_size": None,
        "crop": None,
        "crop_drift": None,
        "encoder": {"name": encoder_name, **nothing},
        "precision": None,
        "encode_batch": min(IMPORT_BATCH, config.cache.shard_size),
        "device": None,
        "normalization": normalization(config),
        "class_names": [],
        "dataset_digest": files.digest(),
        "dataset": {
            "kind": IMPORTED,
            "source": str(folder),
            "segments": [{"images": len(files.labels), "digest": files.digest()}],
        },
        "config": recipe(config),
        "versions": versions(),
    }


def import_units(files: LatentFiles, attrs: dict[str, Any], units: Sequence[Unit]) -> Iterator[RawBatch]:
    """Rows of units from the files, in batches as an encoder would give them."""
    names = files.names()
    for unit in units:
        for first in range(0, len(unit.rows), attrs["encode_batch"]):
            rows = unit.rows[first : first + attrs["encode_batch"]]
            planes = {view: files.read(rows, view) for view in attrs["views"]}
            finite_B = torch.stack([z.isfinite().flatten(1).all(1) for z in planes.values()]).all(0)
            for z in planes.values():
                z[~finite_B] = 0
            failures = [(row, names[row], NOT_FINITE) for row in rows[~finite_B.numpy()].tolist()]
            yield RawBatch(unit, first, first + len(rows) == len(unit.rows), planes, finite_B, failures)
