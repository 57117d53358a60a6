"""What a build in progress has finished: one record per shard, written after the shard's files are in place.

A record holds what the finished store needs to know about its shard (checksums, validity, failures, codec error), so
that finishing reads records only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rae_fast.latents.layout import WORK, canonical_json
from rae_fast.latents.storage import Storage

COMMITS = f"{WORK}/commits"


@dataclass(frozen=True)
class Failure:
    """An image that is not in the store: its row, its path, and why."""

    index: int
    path: str
    reason: str


@dataclass
class ShardRecord:
    """A finished shard.

    Attributes:
        shard: its number.
        files: key -> (size, CRC-32C) of the files it consists of.
        row_crcs: per plane, CRC-32C of each row.
        valid: for each row whether it holds an image.
        failures: the images that it lacks.
        codec_error: sums of `CodecError`.
    """

    shard: int
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    row_crcs: dict[str, list[int]] = field(default_factory=dict)
    valid: list[bool] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    codec_error: dict[str, float] = field(default_factory=dict)


def record_key(shard: int) -> str:
    """Key of a shard's record."""
    return f"{COMMITS}/{shard:07d}.json"


def write_record(storage: Storage, record: ShardRecord) -> None:
    """Commit a shard; its files must be in place."""
    storage.write(record_key(record.shard), canonical_json(asdict(record)))


def record_from(content: Mapping[str, Any]) -> ShardRecord:
    """A record from its JSON."""
    return ShardRecord(
        content["shard"],
        {key: (size, crc) for key, (size, crc) in content["files"].items()},
        content["row_crcs"],
        content["valid"],
        [Failure(**failure) for failure in content["failures"]],
        content["codec_error"],
    )


def read_record(storage: Storage, shard: int, rows: int) -> ShardRecord | None:
    """A shard's record if the shard is really finished: all its files there, of the right size; else None."""
    try:
        record = record_from(json.loads(storage.read(record_key(shard))))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if record.shard != shard or len(record.valid) != rows:
        return None
    return record if all(storage.size(key) == size for key, (size, _) in record.files.items()) else None


def committed_shards(storage: Storage) -> set[int]:
    """Numbers of the shards that have a record."""
    names = [key.removeprefix(f"{COMMITS}/").removesuffix(".json") for key in storage.list(COMMITS)]
    return {int(name) for name in names if name.isdigit()}
