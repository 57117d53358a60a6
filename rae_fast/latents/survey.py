"""First pass of a build that computes its own statistics: encode, gather moments, and keep the latents for later.

Moments are written unit by unit in float64 and merged in the order of the shards, so that mean and variance are the
same for any number of ranks, interruptions and batch sizes. Where the disk has room, the un-normalized latents wait in
the work folder, exactly as the encoder gave them, and the second pass only normalizes; else it encodes again, to the
same bytes.

Shapes: N rows, B rows of a batch, C, H, W of a latent.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from math import prod
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.latents.encode import RawBatch, Unit
from rae_fast.latents.layout import PIXELS, WORK, Plane, shard_count
from rae_fast.latents.stats import LatentStatistics
from rae_fast.latents.storage import LocalStorage, Storage
from rae_fast.rng import permutation

if TYPE_CHECKING:
    from rae_fast.latents.build import Build

MOMENTS = f"{WORK}/moments"
RAW = f"{WORK}/raw"
ROOM_FACTOR = 1.1  # free space wanted over what store and work folder take together
RAW_DTYPE = torch.float32


def moments_key(shard: int) -> str:
    """Key of a unit's moments, which are written last: they say that the unit has been surveyed."""
    return f"{MOMENTS}/{shard:07d}.npz"


def raw_key(plane: str, shard: int) -> str:
    """Key of a unit's un-normalized latents, or of its pixels."""
    return f"{RAW}/{plane}/{shard:07d}.bin"


def survey_units(build: Build) -> list[Unit]:
    """What the first pass encodes: all rows, or a seeded subset of `cache.statistics_images` of them."""
    n, size = build.attrs["num_images"], build.attrs["shard_size"]
    wanted = build.attrs["normalization"]["images"]
    chosen = np.arange(n) if wanted is None or wanted >= n else np.sort(permutation(0, 0, n)[:wanted])
    starts = np.searchsorted(chosen, np.arange(shard_count(n, size) + 1) * size)
    units = [Unit(s, chosen[first:last]) for s, (first, last) in enumerate(pairwise(starts.tolist()))]
    return [unit for unit in units if len(unit.rows)]


def has_room(build: Build) -> bool:
    """Whether the un-normalized latents may wait on disk."""
    n = build.attrs["num_images"]
    raw = n * (len(build.attrs["views"]) * prod(build.attrs["latent_shape"]) * RAW_DTYPE.itemsize)
    finished = sum(plane.row_bytes + plane.scale_bytes for plane in build.planes.values()) * n
    pixels = build.planes[PIXELS].row_bytes * n if PIXELS in build.planes else 0
    free = build.storage.free_bytes()
    return free is not None and free > ROOM_FACTOR * (raw + pixels + finished)


def survey(build: Build) -> None:
    """Gather the moments of this rank's units that have none yet."""
    units = survey_units(build)
    missing = [unit for unit in units if build.storage.size(moments_key(unit.shard)) is None]
    mine = build.mine(missing)
    progress = build.progress("statistics", units, missing)
    whole = {unit.shard for unit in units if len(unit.rows) == len(build.rows(unit.shard))}
    stage = bool(build.storage.is_local and has_room(build))
    for unit, batches in _by_unit(build.encode(mine)):
        statistics = LatentStatistics(tuple(build.attrs["latent_shape"]))
        facts: dict[str, Any] = {"valid": [], "failures": [], "staged": stage and unit.shard in whole}
        with ExitStack() as stack:
            files = {}
            if facts["staged"]:
                files = {
                    name: stack.enter_context(build.storage.create(raw_key(name, unit.shard))) for name in build.planes
                }
            for batch in batches:
                for name, file in files.items():
                    file.write(_raw_bytes(batch.planes[name]).data)
                for view in build.attrs["views"]:
                    statistics.update(batch.planes[view][batch.valid_B.to(batch.planes[view].device)])
                facts["valid"] += batch.valid_B.tolist()
                facts["failures"] += batch.failures
                build.advance(progress, batch)
        _write_moments(build.storage, unit.shard, statistics, facts)
    progress.close()


def _by_unit(batches: Iterator[RawBatch]) -> Iterator[tuple[Unit, Iterator[RawBatch]]]:
    """Batches grouped by the unit they belong to."""
    for first in batches:

        def rest(batch: RawBatch = first) -> Iterator[RawBatch]:
            yield batch
            while not batch.last_of_unit:
                batch = next(batches)
                yield batch

        yield first.unit, rest()


def _raw_bytes(plane: Tensor) -> np.ndarray:
    kept = plane if plane.dtype == torch.uint8 else plane.to(RAW_DTYPE)
    return kept.contiguous().cpu().numpy().reshape(-1).view(np.uint8)


def _write_moments(storage: Storage, shard: int, statistics: LatentStatistics, facts: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **statistics.state())
    storage.write(moments_key(shard), buffer.getvalue())


def read_moments(storage: Storage, shard: int) -> tuple[LatentStatistics, dict[str, Any]] | None:
    """A unit's statistics and what else its survey found, None if it has not been surveyed."""
    try:
        loaded = np.load(io.BytesIO(storage.read(moments_key(shard))))
    except FileNotFoundError:
        return None
    state = {name: loaded[name] for name in loaded.files if name != "facts"}
    return LatentStatistics.from_state(state), json.loads(loaded["facts"].tobytes())


def merge_moments(build: Build) -> LatentStatistics:
    """Statistics of all units, merged in the order of their shards."""
    total = LatentStatistics(tuple(build.attrs["latent_shape"]))
    for unit in survey_units(build):
        found = read_moments(build.storage, unit.shard)
        assert found is not None
        total.merge(found[0])
    return total


def staged_batches(build: Build, shards: Sequence[int]) -> Iterator[RawBatch]:
    """What the first pass kept of these units, in the batches in which it was encoded."""
    assert isinstance(build.storage, LocalStorage)
    batch_size = build.attrs["encode_batch"]
    for shard in shards:
        found = read_moments(build.storage, shard)
        assert found is not None
        facts = found[1]
        unit = Unit(shard, np.asarray(build.rows(shard)))
        valid = torch.tensor(facts["valid"])
        files = {name: build.storage.path(raw_key(name, shard)).open("rb") for name in build.planes}
        with ExitStack() as stack:
            for file in files.values():
                stack.enter_context(file)
            for first in range(0, len(unit.rows), batch_size):
                build.stop()
                count = min(batch_size, len(unit.rows) - first)
                planes = {name: _read_raw(file, build.planes[name], count) for name, file in files.items()}
                inside = set(unit.rows[first : first + count].tolist())
                failures = [tuple(failure) for failure in facts["failures"] if failure[0] in inside]
                last = first + count == len(unit.rows)
                yield RawBatch(unit, first, last, planes, valid[first : first + count], failures)


def _read_raw(file: IO[bytes], plane: Plane, count: int) -> Tensor:
    dtype = torch.uint8 if plane.name == PIXELS else RAW_DTYPE
    buffer = bytearray(file.read(count * prod(plane.row_shape) * dtype.itemsize))
    return torch.frombuffer(buffer, dtype=dtype).reshape(count, *plane.row_shape)


def staged_shards(build: Build, shards: Sequence[int]) -> set[int]:
    """Which of these units wait un-normalized in the work folder."""
    staged = set()
    for shard in shards:
        if all(build.storage.size(raw_key(name, shard)) is not None for name in build.planes):
            found = read_moments(build.storage, shard)
            if found is not None and found[1]["staged"]:
                staged.add(shard)
    return staged
