"""Hugging Face image datasets in parquet (imagenet-1k's layout): a column `image` {bytes, path} and a column of labels.

A row is reached through its row group; the groups used last are kept, so that reading in order reads each group once.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rae_fast.errors import UserError
from rae_fast.images.entries import UNKNOWN_SIZE, Entries, ImageIndex, ReadError
from rae_fast.images.patterns import expand, shown_names

LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
MAX_GROUPS_KEPT = 4


class ParquetReader:
    """Reads the encoded image of row i.

    Args:
        files: the parquet files.
        group_file: file of each row group, over all files.
        group_in_file: its number within the file.
        group_start: first row of each group, and the number of rows at the end.
        column: the column of images.
    """

    def __init__(
        self, files: list[str], group_file: list[int], group_in_file: list[int], group_start: list[int], column: str
    ) -> None:
        self._files, self._column = files, column
        self._group_file, self._group_in_file = group_file, group_in_file
        self._group_start = np.array(group_start, np.int64)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._locks = [threading.Lock() for _ in group_file]
        self._lock = threading.Lock()

    def read(self, i: int) -> bytes:
        """Bytes of the image in row `i`.

        Raises:
            ReadError: the row has none, or the file cannot be read.
        """
        group = int(np.searchsorted(self._group_start, i, "right")) - 1
        value = self._rows(group)[int(i - self._group_start[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise ReadError("the row has no image bytes")
        return data

    def _rows(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._locks[group]:  # two threads that want one group read it once
            with self._lock:
                if group in self._kept:
                    self._kept.move_to_end(group)
                    return self._kept[group]
            try:
                with pq.ParquetFile(self._files[self._group_file[group]]) as file:
                    table = file.read_row_group(self._group_in_file[group], columns=[self._column], use_threads=False)
            except pa.ArrowException as error:
                raise ReadError(f"row group cannot be read: {' '.join(str(error).split())[:200]}") from error
            rows = table.column(self._column)
            with self._lock:
                self._kept[group] = rows
                if len(self._kept) > MAX_GROUPS_KEPT:
                    self._kept.popitem(last=False)
            return rows


def index_parquet(source: str) -> ImageIndex:
    """Rows of parquet files (a pattern, a folder, one file) in order of file and row; class names from the schema.

    Sizes of single images are unknown without reading all of them; the digest covers those of files and row groups.

    Raises:
        UserError: pyarrow is missing, no file, no image column, or splits are mixed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"data.source {source} needs pyarrow, which is not installed",
            "pyarrow 15 or later",
            "pip install rae_fast[parquet]",
        ) from error
    files = expand(source, ".parquet", "parquet files")
    _refuse_mixed_splits(files, source)
    entries, labels, groups = Entries(), [], _Groups()
    class_names: tuple[str, ...] = ()
    for number, (path, shown) in enumerate(zip(files, shown_names(files), strict=True)):
        try:
            with pq.ParquetFile(path) as file:
                columns = _columns(file.schema_arrow, path)
                class_names = _class_names(file.schema_arrow, columns[1]) or class_names
                labels.append(_labels(file, columns[1], path))
                groups.add(number, file.metadata, f"{shown}|{Path(path).stat().st_size}")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}", "a parquet file") from error
        for row in range(len(labels[-1])):
            entries.add(f"{shown}#{row}", 0, UNKNOWN_SIZE)
    reader = ParquetReader(files, groups.file, groups.in_file, groups.start, columns[0])
    return entries.finish(
        class_names,
        reader,
        kind="parquet",
        source=source,
        extra="\n".join(groups.facts).encode(),
        labels=np.concatenate(labels),
    )


class _Groups:
    """Row groups over all files."""

    def __init__(self) -> None:
        self.file: list[int] = []
        self.in_file: list[int] = []
        self.start = [0]
        self.facts: list[str] = []

    def add(self, number: int, metadata: Any, fact: str) -> None:
        sizes = [metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)]
        self.facts.append(f"{fact}|{sizes}")
        for group in range(metadata.num_row_groups):
            self.file.append(number)
            self.in_file.append(group)
            self.start.append(self.start[-1] + metadata.row_group(group).num_rows)


def _columns(schema: Any, path: str) -> tuple[str, str | None]:
    """Names of the image column and of the label column, if there is one."""
    import pyarrow as pa

    images = [
        field.name
        for field in schema
        if (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
        or (field.name == "image" and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)))
    ]
    if not images:
        raise UserError(f"{path} has no column of images, only {schema.names}", "a column `image` {bytes, path}")
    labels = [name for name in LABEL_COLUMNS if name in schema.names]
    return ("image" if "image" in images else images[0]), (labels[0] if labels else None)


def _class_names(schema: Any, column: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel, which `datasets` keeps as JSON in the schema's metadata."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(column, {})
    names: Sequence[str] | dict[str, str] = feature.get("names", ()) if isinstance(feature, dict) else ()
    return tuple(names[key] for key in sorted(names, key=int)) if isinstance(names, dict) else tuple(names)


def _labels(file: Any, column: str | None, path: str) -> np.ndarray:
    if column is None:
        return np.zeros(file.metadata.num_rows, np.int64)
    values = file.read(columns=[column]).column(column).to_numpy()
    if values.dtype.kind not in "iu":
        raise UserError(f"{path}: column {column} holds {values.dtype}, some perhaps missing", "whole numbers")
    if len(values) and values.min() < 0:
        raise UserError(
            f"{path}: column {column} holds {values.min()}", "labels from 0 upwards", "use a labelled split"
        )
    return values.astype(np.int64)


def _refuse_mixed_splits(files: list[str], source: str) -> None:
    """A folder of a dataset holds train, validation and test side by side: one of them is meant."""
    splits = sorted({Path(file).name.split("-")[0] for file in files if "-of-" in Path(file).name})
    if len(splits) > 1:
        folder = Path(files[0]).parent
        raise UserError(
            f"data.source {source} holds several splits: {', '.join(splits)}",
            "one split",
            f"set data.source to '{folder}/{splits[-2] if 'train' not in splits else 'train'}-*.parquet'",
        )
