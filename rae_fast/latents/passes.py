"""The passes of a build: statistics, latents, the end; each does what is missing and waits for the other ranks.

The end writes side arrays, attributes, checksums of everything, and the backup of the small files.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import numpy as np

from rae_fast.latents import survey as first_pass
from rae_fast.latents.build import Build
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.codecs import CodecError
from rae_fast.latents.encode import Unit
from rae_fast.latents.layout import BACKUP, FAILURES, MANIFEST, WORK, metadata_files, single_chunk_key
from rae_fast.latents.manifest import backup_bytes, manifest_bytes
from rae_fast.latents.records import ShardRecord, committed_shards, read_record, write_record
from rae_fast.latents.sink import ShardSink
from rae_fast.latents.stats import MEAN, VAR, write_statistics


def run_passes(build: Build) -> None:
    """Complete the store."""
    gather_statistics(build)
    write_latents(build)
    if build.ranks.is_main:
        build.wait_for(lambda: committed_shards(build.storage) >= set(build.shards))
        finish(build)
    else:
        build.wait_for(lambda: build.storage.size(MANIFEST) is not None)


def gather_statistics(build: Build) -> None:
    """Have mean and variance in place, computing them if that is what the store wants."""
    storage = build.storage
    if storage.size(MEAN) is not None:
        return
    first_pass.survey(build)
    if build.ranks.is_main:
        wanted = {first_pass.moments_key(unit.shard) for unit in first_pass.survey_units(build)}
        build.wait_for(lambda: wanted <= set(storage.list(first_pass.MOMENTS)))
        write_statistics(storage, *first_pass.merge_moments(build).finish())
    else:
        build.wait_for(lambda: storage.size(MEAN) is not None)


def write_latents(build: Build) -> None:
    """Normalize, encode and write this rank's shards that have no record yet."""
    units = [Unit(shard, np.asarray(build.rows(shard))) for shard in build.shards]
    missing = [unit for unit in units if read_record(build.storage, unit.shard, len(unit.rows)) is None]
    mine = [without_kept(build, unit) for unit in build.mine(missing)]
    staged = first_pass.staged_shards(build, [unit.shard for unit in mine])
    batches = chain(
        first_pass.staged_batches(build, sorted(staged)) if staged else (),
        build.encode([unit for unit in mine if unit.shard not in staged]),
    )
    progress = build.progress("latents", units, [without_kept(build, unit) for unit in missing])

    def commit(record: ShardRecord) -> None:
        write_record(build.storage, record)
        for name in build.planes:
            build.storage.delete(first_pass.raw_key(name, record.shard))

    with ShardSink(build, commit) as sink:
        for batch in batches:
            sink.put(batch)
            build.advance(progress, batch)
    progress.close()


def without_kept(build: Build, unit: Unit) -> Unit:
    """The rows of a unit that have to be encoded: an append keeps those that its first shard has already."""
    if build.kept is None or build.kept.shard != unit.shard:
        return unit
    return Unit(unit.shard, unit.rows[len(build.kept.valid) :])


def finish(build: Build) -> None:
    """Complete a store whose shards are all committed; the manifest comes last and makes it a store."""
    records = []
    for shard in build.shards:
        record = read_record(build.storage, shard, len(build.rows(shard)))
        assert record is not None
        records.append(record)
    storage = build.storage
    failures = [failure for record in records for failure in record.failures]
    head = {
        single_chunk_key("valid"): np.array([v for record in records for v in record.valid], bool).tobytes(),
        FAILURES: b"".join(
            json.dumps({"index": f.index, "path": f.path, "reason": f.reason}).encode() + b"\n" for f in failures
        ),
    }
    for name, plane in build.planes.items():
        crcs = np.concatenate([np.array(record.row_crcs[name], "<u4") for record in records])
        head[single_chunk_key(plane.crc_array)] = crcs.tobytes()
    kept = [single_chunk_key(name) for name in ("labels", "paths/blob", "paths/offsets")]
    kept += [MEAN, VAR]
    head.update({key: storage.read(key) for key in kept})
    attrs = final_attributes(build.attrs, records)
    head.update(metadata_files(attrs, len(head[single_chunk_key("paths/blob")])))
    checks = {key: check for record in records for key, check in record.files.items()}
    checks.update({key: (len(data), crc32c(data)) for key, data in head.items()})
    manifest = manifest_bytes(checks)
    for key, data in head.items():
        if key not in kept:
            storage.write(key, data)
    storage.write(BACKUP, backup_bytes({**head, MANIFEST: manifest}))
    storage.write(MANIFEST, manifest)
    storage.delete_folder(WORK)


def final_attributes(attrs: dict[str, Any], records: list[ShardRecord]) -> dict[str, Any]:
    """The attributes with what only the finished data can tell: valid images, and the codec's error on them."""
    before = attrs.get("codec_error_before", {})
    error = CodecError(**before.get("sums", {}))
    for record in records:
        error.add(CodecError(**record.codec_error))
    valid = sum(sum(record.valid) for record in records)
    kept = {name: value for name, value in attrs.items() if name != "codec_error_before"}
    codec_error = {**error.report(), "sums": error.sums()}
    return {**kept, "complete": True, "valid_images": valid, "codec_error": codec_error}
