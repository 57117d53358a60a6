"""One ordered index over whatever holds the images: class folders, a plain folder, tars, parquet, a list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rae_fast.errors import UserError, nearest
from rae_fast.images.entries import ImageIndex, PathTable, ReadError
from rae_fast.images.folders import EXTENSIONS, index_class_folders, index_folder, index_list
from rae_fast.images.parquet import index_parquet
from rae_fast.images.tars import index_tars

if TYPE_CHECKING:
    from rae_fast.config import Data

__all__ = ["ImageIndex", "PathTable", "ReadError", "build_index"]

KINDS = ("auto", "imagefolder", "folder", "webdataset", "parquet", "list")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")


def build_index(data: Data) -> ImageIndex:
    """The index of `data.source`, cut to `data.limit`.

    Raises:
        UserError: the source is missing, empty, or not what `data.kind` says.
    """
    if not data.source:
        raise UserError("data.source is not set", "a folder of images, tars, parquet files or a list")
    if data.kind not in KINDS:
        raise UserError(f"data.kind is {data.kind!r}{nearest(data.kind, KINDS)}", f"one of {', '.join(KINDS)}")
    source = data.source
    path = Path(source)
    kind = _kind_of(path, source) if data.kind == "auto" else data.kind
    if kind in ("imagefolder", "folder") and not path.is_dir():
        raise UserError(f"data.source {source} is not a folder", f"a folder of images (data.kind {kind})")
    if kind == "imagefolder":
        index = index_class_folders(path, source)
    elif kind == "folder":
        index = index_folder(path, source)
    elif kind == "webdataset":
        index = index_tars(source)
    elif kind == "parquet":
        index = index_parquet(source)
    else:
        index = index_list(path, source)
    return index if data.limit is None else index.first(data.limit)


def _kind_of(path: Path, source: str) -> str:
    """What a source must be, by its name, or by what lies in it."""
    if path.suffix in LIST_SUFFIXES and not path.is_dir():
        return "list"
    if path.suffix == ".tar":
        return "webdataset"
    if path.suffix == ".parquet":
        return "parquet"
    if not path.exists():
        raise UserError(f"data.source {source} does not exist", "a folder, a list, tars or parquet files")
    if not path.is_dir():
        raise UserError(f"data.source {source} is of no known kind", "a folder, a list, tars or parquet files")
    suffixes = {entry.suffix.lower() for entry in path.iterdir()}
    if suffixes & {".tar"}:
        return "webdataset"
    # Datasets from the hub keep their parquet files in `data` or in a folder of the configuration's name.
    if suffixes & {".parquet"} or any(path.glob("*/*.parquet")):
        return "parquet"
    return "folder" if suffixes & set(EXTENSIONS) else "imagefolder"
