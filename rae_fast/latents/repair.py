"""Mending a store: small files from their backup, shards by encoding exactly the bad ones again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.latents.build import Build
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.encode import EncodeJob, LatentEncoder, Unit, encode_units
from rae_fast.latents.imports import IMPORTED, import_units, open_files
from rae_fast.latents.layout import BACKUP, MANIFEST, PIXELS, WORK, single_chunk_key
from rae_fast.latents.lock import builder_lock
from rae_fast.latents.manifest import Checks, DamagedError, backup_bytes, intact_head, manifest_bytes
from rae_fast.latents.plan import check_encoder, positions_by_path
from rae_fast.latents.records import ShardRecord
from rae_fast.latents.sink import ShardSink
from rae_fast.latents.sources import open_source
from rae_fast.latents.storage import TEMPORARY, Storage, open_storage
from rae_fast.latents.store import LatentStore, check_compatible, damaged
from rae_fast.latents.verify import Damage, open_intact, trusted_checks, verify
from rae_fast.runtime import Ranks, pick_device


@dataclass
class RepairReport:
    """What a repair did.

    Attributes:
        restored: small files taken from the backup, or written to it.
        shards: numbers of the shards that were encoded again.
        changed: those of them whose bytes are not the old ones (another machine or library rounds differently); their
            checksums were written anew.
    """

    restored: list[str]
    shards: list[int]
    changed: list[int]


def repair(url: str, config: Config, *, show_progress: bool = False) -> RepairReport:
    """Verify a store and mend all that is bad.

    Args:
        url: the store.
        config: how it was built (`plan.config_of` has it from the store), with a source that still has its images.
        show_progress: print progress.

    Raises:
        UserError: a small file and its backup are both damaged, the source or the encoder is not the one that made
            the store, or another builder is at work on it.
    """
    storage = open_storage(url)
    ranks = Ranks()
    with builder_lock(storage, ranks, lambda: None):
        try:
            report = verify(url, show_progress=show_progress)
            checks, _ = trusted_checks(storage)
            restored = _restore_head(storage, checks, report.damages)
            bad = [damage for damage in report.damages if damage.shard is not None]
            changed: list[int] = []
            if bad:
                changed = _encode_again(storage, checks, config, bad, ranks)
            for stray in report.strays:
                if stray.endswith(TEMPORARY):
                    storage.delete(stray)
        finally:
            storage.delete_folder(WORK)
    return RepairReport(restored, sorted({int(damage.shard) for damage in bad if damage.shard is not None}), changed)


def _restore_head(storage: Storage, checks: Checks, damages: Sequence[Damage]) -> list[str]:
    """Bring back small files from the backup, then the manifest and the backup themselves."""
    keys = [damage.key for damage in damages if damage.shard is None]
    if not keys:
        return []
    try:
        head = intact_head(storage, checks)
    except DamagedError as error:
        raise damaged(storage, f"{error}; only building it anew helps") from error
    for key in keys:
        if key in head:
            storage.write(key, head[key])
    _write_ends(storage, checks, head)
    return keys


def _write_ends(storage: Storage, checks: Checks, head: dict[str, bytes]) -> None:
    """Write backup and manifest of a store whose other files are in place."""
    manifest = manifest_bytes(checks)
    storage.write(BACKUP, backup_bytes({**head, MANIFEST: manifest}))
    storage.write(MANIFEST, manifest)


def _encode_again(storage: Storage, checks: Checks, config: Config, bad: Sequence[Damage], ranks: Ranks) -> list[int]:
    """Encode the bad shards again; returns those whose bytes are not the old ones."""
    store = open_intact(storage, checks)
    build = repair_build(store, config, frozenset(damage.plane for damage in bad if damage.plane), ranks)
    shards = sorted({damage.shard for damage in bad if damage.shard is not None})
    records: list[ShardRecord] = []
    units = [Unit(shard, np.asarray(build.rows(shard))) for shard in shards]
    progress = build.progress("repair", units, units)
    with ShardSink(build, records.append) as sink:
        for batch in build.encode(units):
            _check_same_images(store, batch.unit.rows[batch.first :][: batch.count], batch.valid_B.numpy())
            sink.put(batch)
            build.advance(progress, batch)
    progress.close()
    changed = [record for record in records if any(checks[key] != check for key, check in record.files.items())]
    if changed:
        _accept(storage, checks, build, changed)
    return [record.shard for record in changed]


def repair_build(store: LatentStore, config: Config, planes: frozenset[str], ranks: Ranks) -> Build:
    """A build that encodes rows of a finished store as its first build did.

    Raises:
        UserError: the encoder is another one, or the source lacks images of the store.
    """
    if store.attrs["dataset"]["kind"] == IMPORTED:
        files = open_files(Path(config.data.source or store.attrs["dataset"]["source"]))
        check_compatible(store, {"dataset_digest": files.digest()}, "bring back the files it was imported from")
        return Build(ranks, store.storage, store.attrs, partial(import_units, files, store.attrs), only=planes)
    device = pick_device(config.runtime.device, ranks.local_rank)
    encoder = LatentEncoder(config.stage_1.params, store.attrs["precision"], device)
    check_encoder(store, encoder)
    source = open_source(config, store.attrs["image_size"])
    job = EncodeJob(
        encoder,
        source,
        positions_by_path(store.paths, source, store.url),
        [view for view in store.views if view in planes],
        PIXELS in planes,
        store.attrs["encode_batch"],
    )
    return Build(ranks, store.storage, store.attrs, partial(encode_units, job), job.times, only=planes)


def _check_same_images(store: LatentStore, rows: np.ndarray, valid_B: np.ndarray) -> None:
    """Raises UserError if an image that the store has can no longer be decoded, or the other way round."""
    different = np.flatnonzero(store.valid[rows] != valid_B)
    if len(different):
        row = int(rows[different[0]])
        state = "could not be decoded when the store was built" if valid_B[different[0]] else "can no longer be decoded"
        raise UserError(
            f"{store.paths[row]} (row {row} of {store.url}) {state}",
            "the images that the store was built from",
            "bring the old file back, or build the store anew",
        )


def _accept(storage: Storage, checks: Checks, build: Build, records: Sequence[ShardRecord]) -> None:
    """Write down the checksums of shards that were encoded to other bytes than before."""
    head = intact_head(storage, checks)
    for name, plane in build.planes.items():
        key = single_chunk_key(plane.crc_array)
        crcs = np.frombuffer(bytearray(head[key]), "<u4")
        for record in records:
            rows = build.rows(record.shard)
            crcs[rows.start : rows.stop] = record.row_crcs[name]
        head[key] = crcs.tobytes()
        storage.write(key, head[key])
        checks[key] = (len(head[key]), crc32c(head[key]))
    for record in records:
        checks.update(record.files)
    _write_ends(storage, checks, head)
