"""The latent store: creating one, opening one, and refusing one that is not what the caller needs.

Shapes: N images, B a batch of them, C, H, W of a latent, S side of the pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.images.entries import PathTable
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.codecs import get_codec
from rae_fast.latents.layout import (
    FAILURES,
    MANIFEST,
    PIXELS,
    Plane,
    metadata_files,
    planes_of,
    single_chunk_key,
)
from rae_fast.latents.manifest import Checks, DamagedError, check_format, parse_manifest
from rae_fast.latents.storage import Storage, open_storage

if TYPE_CHECKING:
    from rae_fast.latents.reader import Reader

ROOT = "zarr.json"


def create_store(storage: Storage, attrs: Mapping[str, Any], paths: PathTable, labels: np.ndarray) -> None:
    """Write what is known before the first image is decoded: names, labels and all metadata, the root's last."""
    storage.write(single_chunk_key("paths/blob"), paths.blob.tobytes())
    storage.write(single_chunk_key("paths/offsets"), paths.offsets.astype("<i8").tobytes())
    storage.write(single_chunk_key("labels"), labels.astype("<i4").tobytes())
    write_metadata(storage, attrs, len(paths.blob))


def write_metadata(storage: Storage, attrs: Mapping[str, Any], paths_bytes: int) -> None:
    """Write every zarr.json, the root's last."""
    for key, data in metadata_files(attrs, paths_bytes).items():
        storage.write(key, data)


def open_store(url: str | Path, *, allow_incomplete: bool = False) -> LatentStore:
    """Open a store for reading.

    Args:
        url: local path or URL of the zarr group.
        allow_incomplete: also open a store whose build has not finished; it serves names and labels only.

    Raises:
        UserError: there is no store, it is of another format version, incomplete, or damaged.
    """
    storage = open_storage(url)
    attrs = read_attributes(storage)
    if attrs is None:
        raise absent(storage)
    if allow_incomplete and storage.size(MANIFEST) is None:
        return LatentStore(storage, attrs, None)
    return LatentStore(storage, attrs, read_checks(storage))


def read_attributes(storage: Storage) -> dict[str, Any] | None:
    """The root's attributes, or None where there is no store.

    Raises:
        UserError: what is there is not a latent store, of another format version, or damaged.
    """
    try:
        attrs = dict(json.loads(storage.read(ROOT))["attributes"])
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(f"{storage.url} is a file", "the folder of a latent store") from error
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(storage, f"{ROOT} is damaged") from error
    check_format(attrs, storage.url)
    return attrs


def read_checks(storage: Storage) -> Checks:
    """Sizes and checksums of all files of a complete store.

    Raises:
        UserError: the store is incomplete or its manifest damaged.
    """
    try:
        return parse_manifest(storage.read(MANIFEST), storage.url)
    except FileNotFoundError as error:
        raise incomplete(storage) from error
    except DamagedError as error:
        raise damaged(storage, str(error)) from error


def absent(storage: Storage) -> UserError:
    """The error for a place without a store."""
    return UserError(
        f"no latent store at {storage.url}",
        "a store made by tools/build_cache.py",
        f"build it with cache.path={storage.url}",
    )


def incomplete(storage: Storage) -> UserError:
    """The error for a store whose build has not come to its end."""
    return UserError(
        f"{storage.url} is incomplete",
        "a store whose build has finished",
        "run tools/build_cache.py with the config that began it; it goes on where it stopped",
    )


def damaged(storage: Storage, what: str) -> UserError:
    """The error for bytes that are not what was written."""
    return UserError(
        f"{storage.url}: {what}", "the bytes that were written", f"run tools/inspect_cache.py repair {storage.url}"
    )


def bad_shard(store: LatentStore, plane: Plane, shard: int, what: str) -> UserError:
    """The error for a shard that cannot be trusted."""
    return UserError(
        f"{store.url}: shard {shard} of {plane.array}: {what}",
        "the bytes that were written",
        f"run tools/inspect_cache.py repair {store.url}",
    )


class LatentStore:
    """Latents of N images, read by row.

    Attributes:
        attrs: the store's attributes: encoder, normalization, codec, data set and so on.
        n: number of rows; those of images that could not be decoded are not `valid`.
        latent_shape: [C, H, W].
        views: names of the views, a subset of ("original", "hflip").
        class_names: by label.
        planes: layout of each view, and of the pixels if the store has them.
    """

    def __init__(self, storage: Storage, attrs: dict[str, Any], checks: Checks | None) -> None:
        self.storage, self.attrs, self.checks = storage, attrs, checks
        self.n: int = attrs["num_images"]
        self.latent_shape: tuple[int, int, int] = tuple(attrs["latent_shape"])
        self.views: tuple[str, ...] = tuple(attrs["views"])
        self.class_names: tuple[str, ...] = tuple(attrs["class_names"])
        self.shard_size: int = attrs["shard_size"]
        self.codec = get_codec(attrs["codec"])
        self.planes = planes_of(self.latent_shape, self.views, self.codec.name, attrs["pixels"])
        if checks is not None:
            # The attributes decide what every other byte means: never trust them unchecked.
            self.read_checked(ROOT)

    @property
    def url(self) -> str:
        """Where the store is."""
        return self.storage.url

    @property
    def complete(self) -> bool:
        """Whether its build has finished."""
        return self.checks is not None

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each row, int32 [N]."""
        return np.frombuffer(self.read_checked(single_chunk_key("labels")), "<i4")

    @cached_property
    def valid(self) -> np.ndarray:
        """Whether each row holds an image, bool [N]."""
        return np.frombuffer(self.read_checked(single_chunk_key("valid")), bool)

    @cached_property
    def paths(self) -> PathTable:
        """Name of each row's image, relative to the source."""
        blob = np.frombuffer(self.read_checked(single_chunk_key("paths/blob")), np.uint8)
        return PathTable(blob, np.frombuffer(self.read_checked(single_chunk_key("paths/offsets")), "<i8"))

    @cached_property
    def mean(self) -> Tensor:
        """Mean that was subtracted, float32 [C, H, W]."""
        return self._statistic("mean")

    @cached_property
    def var(self) -> Tensor:
        """Variance that was divided by (square root of var + eps), float32 [C, H, W]."""
        return self._statistic("var")

    def _statistic(self, name: str) -> Tensor:
        data = bytearray(self.read_checked(single_chunk_key(f"stats/{name}", 3)))
        return torch.frombuffer(data, dtype=torch.float32).reshape(self.latent_shape)

    def crcs(self, plane: Plane) -> np.ndarray:
        """Checksum of each row, uint32 [N]."""
        return np.frombuffer(self.read_checked(single_chunk_key(plane.crc_array)), "<u4")

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """Images that could not be decoded: `index`, `path`, `reason`, in row order."""
        return [json.loads(line) for line in self.read_checked(FAILURES).decode().splitlines()]

    def read_checked(self, key: str) -> bytes:
        """A small file's bytes.

        Raises:
            UserError: it is missing, or not what was written.
        """
        try:
            data = self.storage.read(key)
        except FileNotFoundError as error:
            raise damaged(self.storage, f"{key} is missing") from error
        if self.checks is not None and self.checks.get(key) != (len(data), crc32c(data)):
            raise damaged(self.storage, f"{key} does not match its checksum")
        return data

    @cached_property
    def reader(self) -> Reader:
        """The reader that `read` uses."""
        from rae_fast.latents.reader import open_reader

        return open_reader(self)

    def read(
        self, indices: Sequence[int] | np.ndarray | Tensor, view: str = "original", out: Tensor | None = None
    ) -> Tensor:
        """Normalized latents of these rows: float32 [B, C, H, W] on the CPU; `pixels` gives uint8 [B, 3, S, S].

        Raises:
            UserError: the store lacks the view, or a row's bytes do not match their checksum.
            IndexError: a row lies outside of the store.
        """
        if view not in self.planes:
            raise UserError(f"{self.url} has no view {view!r}", f"one of {', '.join(self.planes)}")
        plane = self.planes[view]
        rows = np.asarray(indices, np.int64)
        stored = np.empty((len(rows), *plane.row_shape), plane.dtype)
        scales = np.empty((len(rows), plane.row_shape[0]), np.float16) if plane.scale_array else None
        self.reader.gather(rows, [plane], np.zeros(len(rows), np.int64), stored, scales)
        tensor = torch.from_numpy(stored)
        if view != PIXELS:
            tensor = self.codec.decode(tensor, None if scales is None else torch.from_numpy(scales))
        return tensor if out is None else out.copy_(tensor)

    def read_pixels(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Crops of these rows, uint8 [B, 3, S, S].

        Raises:
            UserError: the store was built without them, or a row's bytes do not match their checksum.
        """
        return self.read(indices, PIXELS)

    def denormalize(self, z_BCHW: Tensor) -> Tensor:
        """Latents as the encoder gave them: z * sqrt(var + eps) + mean."""
        mean, var = self.mean.to(z_BCHW.device), self.var.to(z_BCHW.device)
        return z_BCHW * (var + self.attrs["normalization"]["eps"]).sqrt() + mean


def check_compatible(store: LatentStore, expectations: Mapping[str, Any], mend: str = "") -> None:
    """Refuse a store whose attributes are not what the caller needs.

    Args:
        store: the store.
        expectations: attribute by dotted name ("encoder.weights_sha256") to the value that is needed.
        mend: what the user can do about it.

    Raises:
        UserError: an attribute differs; it names the attribute and both values.
    """
    for name, expected in expectations.items():
        found: Any = store.attrs
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if _plain(found) != _plain(expected):
            raise UserError(
                f"{store.url}: {name} is {_short(found)}",
                _short(expected),
                mend or "run tools/build_cache.py with this config and another cache.path, or mend the config",
            )


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
