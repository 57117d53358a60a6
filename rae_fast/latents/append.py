"""New images at the end of a finished store, without encoding the old ones again.

A store that is being extended is an incomplete store: its manifest goes first, and the build that completes it is an
ordinary one whose old shards are already committed. Only the last shard, if it was not full, is written anew, its old
rows copied as they are. Killed anywhere, the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rae_fast.errors import UserError
from rae_fast.images.entries import PathTable
from rae_fast.latents.layout import EMPTY, WORK, Plane, canonical_json, shard_count, shard_rows
from rae_fast.latents.manifest import Checks
from rae_fast.latents.records import Failure, ShardRecord, record_from, write_record
from rae_fast.latents.shard import ShardFile, read_index
from rae_fast.latents.sources import ImageSource
from rae_fast.latents.storage import Storage
from rae_fast.latents.store import LatentStore, bad_shard, create_store

PLAN = f"{WORK}/append.json"  # what the extended store will be; until it is there, nothing has happened
PATHS = f"{WORK}/append.paths"
LABELS = f"{WORK}/append.labels"


def new_images(store: LatentStore, source: ImageSource) -> list[int]:
    """Positions of the source's images that the store lacks, in order.

    Raises:
        UserError: images of the store are gone from the source, or have changed there.
    """
    if source.digest == store.attrs["dataset_digest"]:
        return []
    stored = set(store.paths)
    fresh = [position for position, path in enumerate(source.paths) if path not in stored]
    lost = len(store.paths) + len(fresh) - len(source)
    if lost:
        present = set(source.paths)
        first = next(path for path in store.paths if path not in present)
        raise UserError(
            f"{store.url} holds {lost} images that {source.source} lacks, first {first}",
            "a source that has all images of the store",
            "mend data.source or data.limit, or build another store with cache.path=<folder>",
        )
    if not fresh:
        raise UserError(
            f"the images in {source.source} have other sizes or labels than when {store.url} was built",
            "the images that it was built from",
            "build another store with cache.path=<folder>",
        )
    return fresh


def plan_append(store: LatentStore, source: ImageSource, positions: Sequence[int]) -> dict[str, Any]:
    """Write down what the store is to become, and return its attributes.

    Old rows keep their labels: classes that are new to the store come after those that it has.
    """
    attrs = dict(store.attrs)
    names = list(attrs["class_names"])
    names += [name for name in source.class_names if name not in names]
    number = [names.index(name) for name in source.class_names]
    labels = [number[source.labels[p]] if number else int(source.labels[p]) for p in positions]
    paths = [source.paths[p] for p in positions]
    addition = hashlib.sha256(canonical_json([[path, label] for path, label in zip(paths, labels, strict=True)]))
    segments = [*attrs["dataset"]["segments"], {"images": len(paths), "digest": addition.hexdigest()}]
    attrs |= {
        "complete": False,
        "num_images": store.n + len(paths),
        "class_names": names,
        "dataset": {**attrs["dataset"], "segments": segments},
        "dataset_digest": source.digest,
        "codec_error_before": attrs["codec_error"],
    }
    table = PathTable.of([*store.paths, *paths])
    storage = store.storage
    storage.write(PATHS, np.concatenate([table.offsets.view(np.uint8), table.blob]).tobytes())
    storage.write(LABELS, np.concatenate([store.labels, np.array(labels, np.int64)]).astype("<i4").tobytes())
    assert store.checks is not None
    plan = {"old": store.n, "attrs": attrs, "records": [asdict(record) for record in old_records(store, store.checks)]}
    storage.write(PLAN, canonical_json(plan))
    return attrs


def old_records(store: LatentStore, checks: Checks) -> list[ShardRecord]:
    """Records of the shards of a finished store, as its build wrote them."""
    crcs = {name: store.crcs(plane) for name, plane in store.planes.items()}
    records = []
    for shard in range(shard_count(store.n, store.shard_size)):
        rows = shard_rows(shard, store.shard_size, store.n)
        record = ShardRecord(shard, valid=store.valid[rows.start : rows.stop].tolist())
        record.failures = [Failure(**failure) for failure in store.failures if failure["index"] in rows]
        for name, plane in store.planes.items():
            record.row_crcs[name] = crcs[name][rows.start : rows.stop].tolist()
            for key in [plane.shard_key(shard)] + ([plane.scale_key(shard)] if plane.scale_array else []):
                record.files[key] = checks[key]
        records.append(record)
    return records


def read_plan(storage: Storage) -> dict[str, Any] | None:
    """The append that is under way, None if there is none."""
    try:
        return json.loads(storage.read(PLAN))
    except FileNotFoundError:
        return None


def begin_append(storage: Storage, plan: Mapping[str, Any]) -> None:
    """Turn the finished store into an unfinished, larger one; doing it again changes nothing."""
    offsets_bytes = (plan["attrs"]["num_images"] + 1) * 8
    raw = np.frombuffer(storage.read(PATHS), np.uint8)
    table = PathTable(raw[offsets_bytes:], raw[:offsets_bytes].view("<i8"))
    full = plan["old"] // plan["attrs"]["shard_size"]
    for content in plan["records"][:full]:
        write_record(storage, record_from(content))
    create_store(storage, plan["attrs"], table, np.frombuffer(storage.read(LABELS), "<i4"))


def kept_record(plan: Mapping[str, Any] | None) -> ShardRecord | None:
    """The old rows of the shard that is to be filled up, None where the old shards were all full."""
    if plan is None or plan["old"] % plan["attrs"]["shard_size"] == 0:
        return None
    return record_from(plan["records"][-1])


def copy_kept_rows(store: LatentStore, plane: Plane, record: ShardRecord, file: ShardFile) -> None:
    """Append the old rows of a shard to its new file, as they are stored.

    Raises:
        UserError: the old shard is damaged.
    """
    storage, shard = store.storage, record.shard
    try:
        index = read_index(storage, plane, shard, store.shard_size)
    except (FileNotFoundError, ValueError) as error:
        raise bad_shard(store, plane, shard, str(error)) from error
    scales = np.frombuffer(storage.read(plane.scale_key(shard)), "<f2") if plane.scale_array else None
    for slot in range(len(record.valid)):
        offset, size = int(index["offset"][slot]), int(index["nbytes"][slot])
        payload = np.frombuffer(storage.read(plane.shard_key(shard), offset, size), np.uint8)
        scale = None if scales is None else scales.reshape(-1, plane.row_shape[0])[slot]
        file.append_payload(payload, scale)
        if EMPTY in (offset, size) or file.row_crcs[-1] != record.row_crcs[plane.name][slot]:
            raise bad_shard(store, plane, shard, f"row {shard * store.shard_size + slot} fails its checksum")
