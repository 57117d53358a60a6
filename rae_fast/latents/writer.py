"""The cache builder: images in, a verified store out, through crashes, on any number of ranks.

The unit of work is one shard with one owner. A killed build leaves finished shards, their records, and temporary files
that nobody reads; the same command, with any number of ranks, redoes what has no record. Nothing in the store depends
on when, how often or by how many ranks it was built.

Shapes: N rows, B rows of a batch, C, H, W of a latent.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images.index import ImageIndex, build_index
from rae_fast.latents import survey as first_pass
from rae_fast.latents.build import Build
from rae_fast.latents.encode import EncodeJob, LatentEncoder, Unit, encode_units
from rae_fast.latents.finish import finish
from rae_fast.latents.layout import MANIFEST, WORK
from rae_fast.latents.lock import builder_lock
from rae_fast.latents.normalization import MEAN, load_statistics, write_statistics
from rae_fast.latents.plan import COMPUTED, GIVEN, cache_path, describe, identity, positions_by_path, statistics_path
from rae_fast.latents.records import ShardRecord, committed_shards, read_record, write_record
from rae_fast.latents.sink import ShardSink
from rae_fast.latents.storage import TEMPORARY, Storage, open_storage
from rae_fast.latents.store import check_compatible, create_store, open_store, read_attributes
from rae_fast.runtime import Ranks, init_distributed, pick_device

BEGUN = f"{WORK}/begun"  # says that the files around it are ours, before the root's metadata does


class Stopped(Exception):
    """SIGTERM arrived; the shard in hand was dropped, everything else is kept."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        url: the store.
        images, failures: rows, and those of them without an image.
        encoded: images that this call encoded or normalized, on all ranks.
        seconds: how long it took.
        limits: the stage that limited, and its share.
    """

    url: str
    images: int
    failures: int
    encoded: int
    seconds: float
    limits: str


def build_cache(config: Config, ranks: Ranks | None = None) -> BuildReport:
    """Build the store of `cache.path`, or go on with it; returns when it is complete, on every rank.

    Raises:
        UserError: bad config or data, a store that does not match, another builder at work, a full disk.
        Stopped: SIGTERM arrived.
    """
    ranks = ranks or Ranks()
    storage = open_storage(cache_path(config))
    if read_attributes(storage) is None:
        _refuse_foreign(storage)
    with _process_group(ranks), _stop_on_sigterm() as stop:
        return _build(config, ranks, storage, stop)


def _build(config: Config, ranks: Ranks, storage: Storage, stop: Callable[[], None]) -> BuildReport:
    started_s = time.monotonic()
    index = build_index(config.data)
    encoder = LatentEncoder(config.stage_1.params, config.cache.precision, _device(config, ranks))
    wanted = describe(config, index, encoder)
    prepared: list[Build | None] = []

    def prepare() -> None:
        prepared.append(_prepare(config, ranks, storage, index, encoder, wanted, stop))

    with builder_lock(storage, ranks, prepare):
        build = prepared[0]
        encoded = 0
        if build is not None:
            done = sum(len(build.rows(shard)) for shard in committed_shards(storage))
            _statistics(build)
            _write(build)
            if ranks.is_main:
                build.wait_for(lambda: committed_shards(storage) >= set(build.shards))
                finish(build)
            else:
                build.wait_for(lambda: storage.size(MANIFEST) is not None)
            encoded = build.attrs["num_images"] - done
        elif ranks.is_main:
            storage.delete_folder(WORK)
        limits = build.job.times.limits() if build else "-"
    store = open_store(storage.url)
    failures = int((~store.valid).sum())
    return BuildReport(storage.url, store.n, failures, encoded, time.monotonic() - started_s, limits)


def _device(config: Config, ranks: Ranks) -> torch.device:
    return pick_device(config.runtime.device, ranks.local_rank)


def _prepare(
    config: Config,
    ranks: Ranks,
    storage: Storage,
    index: ImageIndex,
    encoder: LatentEncoder,
    wanted: dict[str, Any],
    stop: Callable[[], None],
) -> Build | None:
    """Begin a store or check the one that is there; None if it is complete."""
    attrs = read_attributes(storage)
    if attrs is None:
        assert ranks.is_main
        _begin(config, storage, wanted, index)
        attrs, positions = wanted, np.arange(len(index))
    else:
        store = open_store(storage.url, allow_incomplete=True)
        check_compatible(store, identity(wanted))
        positions = np.arange(len(index))
        if attrs["dataset"]["segments"][-1] != wanted["dataset"]["segments"][-1]:
            positions = positions_by_path(store.paths, index, storage.url)
    if ranks.is_main:
        _remove_strays(storage)
    if storage.size(MANIFEST) is not None:
        return None
    job = EncodeJob(
        encoder,
        index,
        positions,
        config,
        attrs["image_size"],
        attrs["crop"],
        attrs["views"],
        attrs["pixels"] is not None,
        attrs["encode_batch"],
        stop=stop,
    )
    return Build(ranks, storage, attrs, job)


def _refuse_foreign(storage: Storage) -> None:
    """Raises UserError unless the place is empty, or holds the beginning of a store that was killed early."""
    other = next((key for key in storage.walk() if not key.startswith(f"{WORK}/")), None)
    if other is not None and storage.size(BEGUN) is None:
        raise UserError(
            f"cache.path {storage.url} is not empty ({other}) and holds no latent store",
            "an empty or new folder",
            "choose another cache.path",
        )


def _begin(config: Config, storage: Storage, attrs: dict[str, Any], index: ImageIndex) -> None:
    """Write the head of a new store; given statistics come with it."""
    storage.write(BEGUN, b"")
    source = attrs["normalization"]["source"]
    if source == GIVEN:
        mean, var = load_statistics(statistics_path(config), tuple(attrs["latent_shape"]))
        write_statistics(storage, mean, var)
    elif source != COMPUTED:
        write_statistics(storage, torch.zeros(attrs["latent_shape"]), torch.ones(attrs["latent_shape"]))
    create_store(storage, attrs, index.paths, index.labels)


def _remove_strays(storage: Storage) -> None:
    """Delete what a killed build was writing."""
    for key in storage.list():
        if key.endswith(TEMPORARY):
            storage.delete(key)


def _statistics(build: Build) -> None:
    """Have mean and variance in place, computing them if that is what the store wants."""
    storage = build.storage
    if storage.size(MEAN) is not None:
        return
    first_pass.survey(build)
    if build.ranks.is_main:
        wanted = {first_pass.moments_key(unit.shard) for unit in first_pass.survey_units(build)}
        build.wait_for(lambda: wanted <= set(storage.list(first_pass.MOMENTS)))
        mean, var = first_pass.merge_moments(build).finish()
        write_statistics(storage, mean, var)
    else:
        build.wait_for(lambda: storage.size(MEAN) is not None)


def _write(build: Build) -> None:
    """Normalize, encode and write this rank's shards that have no record yet."""
    units = [Unit(shard, np.asarray(build.rows(shard))) for shard in build.shards]
    missing = [unit for unit in units if read_record(build.storage, unit.shard, len(unit.rows)) is None]
    mine = build.mine(missing)
    staged = first_pass.staged_shards(build, [unit.shard for unit in mine])
    batches = chain(
        first_pass.staged_batches(build, sorted(staged)) if staged else (),
        encode_units(build.job, [unit for unit in mine if unit.shard not in staged]),
    )
    progress = build.progress("latents", units, missing)

    def commit(record: ShardRecord) -> None:
        write_record(build.storage, record)
        for name in build.planes:
            build.storage.delete(first_pass.raw_key(name, record.shard))

    with ShardSink(build, commit) as sink:
        for batch in batches:
            sink.put(batch)
            build.advance(progress, batch)
    progress.close()


@contextmanager
def _process_group(ranks: Ranks) -> Iterator[None]:
    """The ranks of this launch, joined for as long as the build lasts if nobody joined them before.

    They need it once, to agree on whose lock it is; everything else they tell each other through files.
    """
    joined_before = torch.distributed.is_initialized()
    init_distributed(ranks, torch.device("cpu"))
    try:
        yield
    finally:
        if torch.distributed.is_initialized() and not joined_before:
            torch.distributed.destroy_process_group()


@contextmanager
def _stop_on_sigterm() -> Iterator[Callable[[], None]]:
    """A function that raises `Stopped` once SIGTERM has arrived; only the main thread can listen for it."""
    arrived = threading.Event()
    listening = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda *_: arrived.set()) if listening else None

    def stop() -> None:
        if arrived.is_set():
            raise Stopped

    try:
        yield stop
    finally:
        if listening:
            signal.signal(signal.SIGTERM, previous)
