"""What a store looks like on disk: which arrays it has, their zarr v3 metadata, and under which key each byte lies.

Every latent is one inner chunk, a shard is one file of `shard_size` latents with its index at the end, and the small
arrays (labels, valid, checksums, paths, statistics) are one chunk each. The metadata is written from here rather than
through a zarr library, so that the same store has the same bytes whatever versions are installed.

Shapes: N images, C, H, W of a latent, S side of the pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from rae_fast.latents.codecs import ZSTD_LEVEL, get_codec

FORMAT = "rae_fast.latents"
FORMAT_VERSION = 1
GROUPS = ("latents", "scale", "crc32c", "paths", "stats")
PIXELS = "pixels"
MANIFEST = "manifest.json"
FAILURES = "failures.jsonl"
BACKUP = "head.backup.tar"
WORK = ".build"  # records and un-normalized latents of a build in progress; gone when the store is complete
EMPTY = 2**64 - 1  # offset and size of an absent inner chunk in a shard's index
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("nbytes", "<u8")])


@dataclass(frozen=True)
class Plane:
    """One sharded array with a row per image: a view of the latents, or the pixels.

    Attributes:
        name: "original", "hflip" or "pixels".
        array: key of the zarr array.
        row_shape: shape of one row.
        dtype: stored element type, numpy's name.
        compressed: rows are zstd frames of varying size.
        scale_array: key of the array of scales, for codecs that have one.
    """

    name: str
    array: str
    row_shape: tuple[int, ...]
    dtype: str
    compressed: bool = False
    scale_array: str | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one decompressed row."""
        return prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of one row of scales."""
        return self.row_shape[0] * 2 if self.scale_array else 0

    @property
    def crc_array(self) -> str:
        """Key of the array of checksums: crc32c of a row's stored bytes, followed by its scales."""
        return f"crc32c/{self.name}"

    def shard_key(self, shard: int) -> str:
        """Key of a shard file."""
        return f"{self.array}/c/{shard}" + "/0" * len(self.row_shape)

    def scale_key(self, shard: int) -> str:
        """Key of the scales that belong to a shard."""
        return f"{self.scale_array}/c/{shard}/0"


def planes_of(
    latent_shape: Sequence[int], views: Sequence[str], codec_name: str, pixels: int | None
) -> dict[str, Plane]:
    """All planes of a store by name; `pixels` is the side of the stored crops or None."""
    codec = get_codec(codec_name)
    planes = {
        view: Plane(
            view,
            f"latents/{view}",
            tuple(latent_shape),
            codec.dtype,
            codec.compressed,
            f"scale/{view}" if codec.has_scale else None,
        )
        for view in views
    }
    if pixels:
        planes[PIXELS] = Plane(PIXELS, PIXELS, (3, pixels, pixels), "uint8")
    return planes


def shard_rows(shard: int, shard_size: int, n: int) -> range:
    """The rows that a shard holds."""
    return range(shard * shard_size, min((shard + 1) * shard_size, n))


def shard_count(n: int, shard_size: int) -> int:
    """How many shards N rows make."""
    return -(-n // shard_size)


def is_head(key: str) -> bool:
    """Whether a file is one of the small ones that the backup holds too: all but shards and scales."""
    return re.match(rf"(latents/[^/]+|scale/[^/]+|{PIXELS})/c/", key) is None


def array_metadata(
    shape: Sequence[int],
    dtype: str,
    *,
    chunk: Sequence[int] | None = None,
    inner_codecs: list[dict[str, Any]] | None = None,
    dimensions: Sequence[str] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """zarr v3 metadata of an array; with `inner_codecs` it is sharded into inner chunks of one row."""
    chunk = list(chunk or shape)
    codecs: list[dict[str, Any]] = [_bytes_codec()]
    if inner_codecs is not None:
        codecs = [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *chunk[1:]],
                    "codecs": inner_codecs,
                    "index_codecs": [_bytes_codec(), {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if dtype == "bool" else 0.0 if dtype.startswith("float") else 0,
        "codecs": codecs,
        "attributes": dict(attributes or {}),
        **({"dimension_names": list(dimensions)} if dimensions else {}),
        "storage_transformers": [],
    }


def _bytes_codec() -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": "little"}}


def all_arrays(attrs: Mapping[str, Any], paths_bytes: int) -> dict[str, dict[str, Any]]:
    """Metadata of every array of a store, by key, from the store's attributes."""
    n, shape = attrs["num_images"], attrs["latent_shape"]
    planes = planes_of(shape, attrs["views"], attrs["codec"], attrs["pixels"])
    arrays = {
        "labels": array_metadata([n], "int32", dimensions=["image"]),
        "valid": array_metadata([n], "bool", dimensions=["image"]),
        "paths/blob": array_metadata([paths_bytes], "uint8"),
        "paths/offsets": array_metadata([n + 1], "int64"),
        "stats/mean": array_metadata(shape, "float32", dimensions=["c", "y", "x"]),
        "stats/var": array_metadata(shape, "float32", dimensions=["c", "y", "x"]),
    }
    for plane in planes.values():
        inner = [_bytes_codec()]
        if plane.compressed:
            inner.append({"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": True}})
        arrays[plane.array] = array_metadata(
            [n, *plane.row_shape],
            plane.dtype,
            chunk=[attrs["shard_size"], *plane.row_shape],
            inner_codecs=inner,
            dimensions=["image", "c", "y", "x"],
            attributes={} if plane.name == PIXELS else {"decode": get_codec(attrs["codec"]).formula},
        )
        arrays[plane.crc_array] = array_metadata([n], "uint32", dimensions=["image"])
        if plane.scale_array:
            channels = plane.row_shape[0]
            arrays[plane.scale_array] = array_metadata(
                [n, channels], "float16", chunk=[attrs["shard_size"], channels], dimensions=["image", "c"]
            )
    return arrays


def metadata_files(attrs: Mapping[str, Any], paths_bytes: int) -> dict[str, bytes]:
    """Every zarr.json of a store, by key, with all metadata consolidated in the root's."""
    arrays = all_arrays(attrs, paths_bytes)
    groups = {
        name: {"zarr_format": 3, "node_type": "group", "attributes": {}}
        for name in GROUPS
        if any(key.startswith(f"{name}/") for key in arrays)
    }
    # zarr-python wants inner groups to say that they, too, are consolidated (their members are in the same flat map),
    # and the members of a group side by side.
    consolidated = {name: {**group, "consolidated_metadata": _consolidated({})} for name, group in groups.items()}
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attrs),
        "consolidated_metadata": _consolidated(dict(sorted({**consolidated, **arrays}.items()))),
    }
    files = {f"{key}/zarr.json": canonical_json(node) for key, node in {**groups, **arrays}.items()}
    files["zarr.json"] = canonical_json(root)
    return files


def _consolidated(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": nodes}


def single_chunk_key(array: str, ndim: int = 1) -> str:
    """Key of the only chunk of a small array."""
    return f"{array}/c" + "/0" * ndim


def canonical_json(content: Any) -> bytes:
    """JSON that is the same bytes for the same content."""
    return (json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def shard_index(sizes: Sequence[int], shard_size: int) -> np.ndarray:
    """Index of a shard whose first rows lie end to end with these sizes; the rest are absent."""
    entries = np.empty(shard_size, INDEX_ENTRY)
    entries["offset"] = entries["nbytes"] = np.uint64(EMPTY)
    lengths = np.asarray(sizes, dtype=np.uint64)
    entries["nbytes"][: len(lengths)] = lengths
    entries["offset"][: len(lengths)] = np.cumsum(lengths) - lengths
    return entries


def index_bytes(shard_size: int) -> int:
    """Size of the index at a shard's end, its crc32c included."""
    return shard_size * INDEX_ENTRY.itemsize + 4
