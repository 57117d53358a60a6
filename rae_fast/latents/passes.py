"""The passes of a build: statistics, latents, the end; each does what is missing and waits for the other ranks."""

from __future__ import annotations

from itertools import chain

import numpy as np

from rae_fast.latents import survey as first_pass
from rae_fast.latents.build import Build
from rae_fast.latents.encode import Unit
from rae_fast.latents.finish import finish
from rae_fast.latents.layout import MANIFEST
from rae_fast.latents.normalization import MEAN, write_statistics
from rae_fast.latents.records import ShardRecord, committed_shards, read_record, write_record
from rae_fast.latents.sink import ShardSink


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
