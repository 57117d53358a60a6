"""The end of a build: side arrays, attributes, checksums of everything, and the backup of the small files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from rae_fast.latents.checksum import crc32c
from rae_fast.latents.codecs import CodecError
from rae_fast.latents.layout import BACKUP, FAILURES, MANIFEST, WORK, metadata_files, single_chunk_key
from rae_fast.latents.manifest import backup_bytes, manifest_bytes
from rae_fast.latents.normalization import MEAN, VAR
from rae_fast.latents.records import ShardRecord, read_record

if TYPE_CHECKING:
    from rae_fast.latents.build import Build


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
