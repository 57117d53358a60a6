"""Sets of images of one size that are read piece by piece: an .npz, a folder, the pixels of a store.

Shapes: N images of a set, n images of a piece, H and W their sides.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from rae_fast.errors import UserError
from rae_fast.evaluation.images import list_images
from rae_fast.images.crop import center_crop_pil
from rae_fast.latents.layout import MANIFEST
from rae_fast.latents.store import ROOT, LatentStore, open_store
from rae_fast.provenance import read_json

# Networks always see pieces of this many rows, the last one padded: matrix products round differently for other row
# counts, and no figure may depend on a batch size.
PIECE = 32
READERS = 8
SAMPLING_MANIFEST = "sampling.json"


class ImageSet(ABC):
    """N images of one size, in a fixed order.

    Attributes:
        source: where they are, as the user named it.
        kind: npz, folder or store.
        count: N.
        size: (H, W).
        fingerprint: changes whenever the files do; cheap, from names, sizes and times of change.
    """

    source: str
    kind: str
    count: int
    size: tuple[int, int]
    fingerprint: str

    @abstractmethod
    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Images start..stop as uint8 [n, H, W, 3] with n <= PIECE.

        Raises:
            UserError: an image cannot be read, or is of another size than the first.
        """

    def facts(self) -> dict[str, Any]:
        """What a report says of the set."""
        return {"source": self.source, "kind": self.kind, "images": self.count, "size": list(self.size)}


def open_images(source: str | Path, image_size: int | None = None) -> ImageSet:
    """The set of images at a path: an .npz with `arr_0`, a folder (or the folder of a sampling job), or a store.

    Args:
        source: path or URL.
        image_size: crop the images of a folder to this side as the reference does; None: they are all of one size.

    Raises:
        UserError: there are no images there.
    """
    if is_store(source):
        return StorePixels(open_store(source))
    path = Path(source)
    if path.suffix == ".npz":
        return NpzImages(path)
    if (path / SAMPLING_MANIFEST).is_file() and (path / "images").is_dir():
        path = path / "images"  # beside it lies the grid, which is no sample
    return FolderImages(path, image_size)


def is_store(source: str | Path) -> bool:
    """Whether a path or URL names a latent store."""
    return "://" in str(source) or (Path(source) / ROOT).is_file()


def sampling_manifest(source: str | Path) -> dict[str, Any] | None:
    """What made the samples at `source`, if the sampler left its manifest in or beside them."""
    path = Path(source)
    for folder in (path, path.parent):
        if (folder / SAMPLING_MANIFEST).is_file():
            return read_json(folder / SAMPLING_MANIFEST)
    return None


class FolderImages(ImageSet):
    """The image files of a folder and the folders in it, sorted by path.

    Args:
        folder: where they are.
        image_size: side of the centre crop; None: the images are taken as they are.
    """

    kind = "folder"

    def __init__(self, folder: Path, image_size: int | None = None) -> None:
        self.source, self._crop = str(folder), image_size
        self._paths = list_images(folder)
        self.count = len(self._paths)
        self.size = _read(self._paths[0], image_size).shape[:2]
        listing = [[str(path.relative_to(folder)), *_stamp(path)] for path in self._paths]
        self.fingerprint = _digest(["folder", str(folder.resolve()), image_size, listing])
        # On first use, so that a process which is forked before it does not inherit dead threads.
        self._pool: ThreadPoolExecutor | None = None

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Decoded by a few threads, which run ahead to `stop` at most."""
        self._pool = self._pool or ThreadPoolExecutor(min(READERS, 2 * (os.cpu_count() or 1)), "images")
        images = self._pool.map(partial(_read, image_size=self._crop), self._paths[start:stop])
        for first in range(start, stop, PIECE):
            rows = range(first, min(first + PIECE, stop))
            yield np.stack([self._of_size(next(images), row) for row in rows])

    def _of_size(self, image_HW3: np.ndarray, row: int) -> np.ndarray:
        if image_HW3.shape[:2] != self.size:
            raise UserError(
                f"{self._paths[row]} is {image_HW3.shape[1]}x{image_HW3.shape[0]}",
                f"{self.size[1]}x{self.size[0]} as {self._paths[0].name}",
                "crop all images to one size (--image-size does)",
            )
        return image_HW3


class NpzImages(ImageSet):
    """`arr_0`, uint8 [N, H, W, 3], of an .npz; 50,000 images of 256 x 256 take 9.8 GB, so it is never held whole.

    Args:
        path: the .npz, stored or compressed.
    """

    kind = "npz"

    def __init__(self, path: Path) -> None:
        self.source, self._path = str(path), path
        with _npz_errors(path), zipfile.ZipFile(path) as archive:
            info = archive.getinfo("arr_0.npy")
            with archive.open(info) as member:
                shape, fortran, dtype = _npy_header(member)
                header_bytes = member.tell()
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or not shape[0]:
            raise UserError(f"{path}: arr_0 is {dtype} {shape}", "uint8 [N, H, W, 3]")
        self.count, self.size = shape[0], (shape[1], shape[2])
        self._shape = tuple(shape)
        self._offset = _data_offset(path, info) + header_bytes if info.compress_type == zipfile.ZIP_STORED else None
        self.fingerprint = _digest(["npz", str(path.resolve()), *_stamp(path)])

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Read where they lie; of a compressed file all that comes before them is decompressed too."""
        with _npz_errors(self._path):
            if self._offset is not None:
                rows = np.memmap(self._path, np.uint8, "r", self._offset, self._shape)
                for first in range(start, stop, PIECE):
                    yield np.array(rows[first : min(first + PIECE, stop)])
                return
            image_bytes = int(np.prod(self._shape[1:]))
            with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as member:
                _npy_header(member)
                member.seek(start * image_bytes, os.SEEK_CUR)
                for first in range(start, stop, PIECE):
                    count = min(PIECE, stop - first)
                    data = member.read(count * image_bytes)
                    yield np.frombuffer(data, np.uint8).reshape(count, *self._shape[1:])


class StorePixels(ImageSet):
    """The crops that a latent store kept, of its valid rows.

    Args:
        store: an open store.

    Raises:
        UserError: it was built without them.
    """

    kind = "store"

    def __init__(self, store: LatentStore) -> None:
        side = store.attrs["pixels"]
        if not side:
            raise UserError(
                f"{store.url} holds no pixels", "a store built with cache.pixels=true", "name a folder of images"
            )
        self.store, self.source = store, store.url
        self._rows = np.flatnonzero(store.valid)
        self.count, self.size = len(self._rows), (side, side)
        self.fingerprint = store_fingerprint(store)

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Checked against the store's checksums."""
        for first in range(start, stop, PIECE):
            pixels_n3SS = self.store.read_pixels(self._rows[first : min(first + PIECE, stop)])
            yield pixels_n3SS.permute(0, 2, 3, 1).contiguous().numpy()


def store_fingerprint(store: LatentStore) -> str:
    """Hash of the store's manifest, which holds the checksums of all its files."""
    return hashlib.sha256(store.storage.read(MANIFEST)).hexdigest()


def _read(path: Path, image_size: int | None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        return np.asarray(center_crop_pil(rgb, image_size) if image_size else rgb)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}", "an image file") from error


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _npz_errors:
    """Turns what a missing, torn or foreign .npz raises into a `UserError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self._path} does not exist", "an .npz with arr_0") from error
        if isinstance(error, KeyError):
            raise UserError(f"{self._path} has no arr_0", "an .npz with arr_0, uint8 [N, H, W, 3]") from error
        if isinstance(error, zipfile.BadZipFile | OSError | ValueError | EOFError):
            raise UserError(f"{self._path} cannot be read: {error}", "an intact .npz") from error


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, whose two lengths are only known there."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
