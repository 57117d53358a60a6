"""The cache builder: images in, a verified store out, through crashes, on any number of ranks.

The unit of work is one shard with one owner. A killed build leaves finished shards, their records, and temporary files
that nobody reads; the same command, with any number of ranks, redoes what has no record. Nothing in the store depends
on when, how often or by how many ranks it was built. Images that are new in the source of a finished store are added
to it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.latents.append import begin_append, kept_record, new_images, plan_append, read_plan
from rae_fast.latents.build import Build
from rae_fast.latents.encode import EncodeJob, LatentEncoder, StageTimes, encode_units
from rae_fast.latents.layout import MANIFEST, WORK
from rae_fast.latents.lock import builder_lock
from rae_fast.latents.passes import run_passes
from rae_fast.latents.plan import (
    COMPUTED,
    GIVEN,
    cache_path,
    describe,
    identity,
    positions_by_path,
    statistics_path,
)
from rae_fast.latents.records import committed_shards
from rae_fast.latents.sources import ImageSource, open_source
from rae_fast.latents.stats import load_statistics, write_statistics
from rae_fast.latents.storage import TEMPORARY, Storage, open_storage
from rae_fast.latents.store import check_compatible, create_store, open_store, read_attributes
from rae_fast.latents.together import SharedDecode, configs_of_stores
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
        waits_s: seconds that each stage kept the others of this rank waiting.
    """

    url: str
    images: int
    failures: int
    encoded: int
    seconds: float
    limits: str
    waits_s: dict[str, float]


def build_cache(config: Config, ranks: Ranks | None = None) -> BuildReport:
    """`build_caches`, and the report of the store of `cache.path`."""
    return build_caches(config, ranks)[0]


def build_caches(config: Config, ranks: Ranks | None = None) -> list[BuildReport]:
    """Build the store of `cache.path` and those of `cache.also`, go on with them, or extend them.

    Returns when they are complete, on every rank: a report for each.

    Raises:
        UserError: bad config or data, a store that does not match, another builder at work, a full disk.
        Stopped: SIGTERM arrived.
    """
    ranks, configs = ranks or Ranks(), configs_of_stores(config)
    storages = [open_storage(cache_path(one)) for one in configs]
    for storage in storages:
        if read_attributes(storage) is None:
            refuse_foreign(storage)
    with process_group(ranks), stop_on_sigterm() as stop, ExitStack() as held:
        source = open_source(config, resolve_geometry(config).image_size)
        if len(configs) == 1:
            prepare = preparation(config, storages[0], source, ranks, stop)
            return [run_build(storages[0], ranks, prepare)]
        shared, failed = SharedDecode(source.decode, len(configs)), threading.Event()

        def stop_all() -> None:
            stop()
            if failed.is_set():
                raise Stopped

        builds = [
            held.enter_context(builder_lock(storage, ranks, preparation(one, storage, part, ranks, stop_all)))
            for one, storage, part in zip(configs, storages, shared.shares(source), strict=True)
        ]

        def run(number: int) -> BuildReport:
            try:
                return carry_out(storages[number], ranks, builds[number])
            except BaseException:
                failed.set()
                raise
            finally:
                shared.leave(number)

        with ThreadPoolExecutor(len(builds), "build") as pool:
            futures = [pool.submit(run, number) for number in range(len(builds))]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:  # what went wrong, rather than that the others were stopped for it
            raise min(errors, key=lambda error: isinstance(error, Stopped))
        return [future.result() for future in futures]


def preparation(
    config: Config, storage: Storage, source: ImageSource, ranks: Ranks, stop: Callable[[], None]
) -> Callable[[], Build | None]:
    """What `builder_lock` calls once the store is ours."""
    device = pick_device(config.runtime.device, ranks.local_rank)
    encoder = LatentEncoder(config.stage_1.params, config.cache.precision, device)
    wanted = describe(config, source, encoder)
    if wanted["normalization"]["source"] == GIVEN:
        # Refused here, before a place is begun.
        load_statistics(statistics_path(config), tuple(wanted["latent_shape"]))

    def prepare() -> Build | None:
        if ranks.is_main:
            begin_or_extend(config, storage, source, wanted, device)
        return _plan(ranks, storage, source, encoder, wanted, stop)

    return prepare


def run_build(storage: Storage, ranks: Ranks, prepare: Callable[[], Build | None]) -> BuildReport:
    """Hold the store, prepare (rank 0 first), and carry out what there is to do."""
    with builder_lock(storage, ranks, prepare) as build:
        return carry_out(storage, ranks, build)


def carry_out(storage: Storage, ranks: Ranks, build: Build | None) -> BuildReport:
    """Complete a store; None: it is complete already."""
    started_s = time.monotonic()
    encoded, times = 0, StageTimes()
    if build is not None:
        done = sum(len(build.rows(shard)) for shard in committed_shards(storage))
        run_passes(build)
        encoded, times = build.attrs["num_images"] - done, build.times
    elif ranks.is_main:
        storage.delete_folder(WORK)
    store = open_store(storage.url)
    failures = int((~store.valid).sum())
    seconds = time.monotonic() - started_s
    return BuildReport(storage.url, store.n, failures, encoded, seconds, times.limits(), times.by_stage())


def begin_or_extend(
    config: Config, storage: Storage, source: ImageSource, wanted: dict[str, Any], device: torch.device
) -> None:
    """Rank 0's preparation: begin a store, check the one that is there, or begin to extend it."""
    for key in storage.list():
        if key.endswith(TEMPORARY):
            storage.delete(key)
    attrs = read_attributes(storage)
    if attrs is None:
        begin_place(config, storage, wanted)
        drift = source.drift(device)
        create_store(storage, {**wanted, "crop_drift": drift}, source.paths, source.labels)
        return
    store = open_store(storage.url, allow_incomplete=True)
    check_compatible(store, identity(wanted))
    plan = read_plan(storage)
    if store.complete and plan is None:
        fresh = new_images(store, source)
        if not fresh:
            return
        print(f"{storage.url}: {len(fresh):,} images are new in {source.source}; they go to its end", flush=True)
        plan_append(store, source, fresh)
        plan = read_plan(storage)
    if plan is not None and attrs["num_images"] != plan["attrs"]["num_images"]:
        storage.delete(MANIFEST)
        begin_append(storage, plan)


def begin_place(config: Config, storage: Storage, attrs: dict[str, Any]) -> None:
    """Mark an empty place as ours, and put given statistics, or none at all, in it.

    Computed ones come with the first pass.
    """
    storage.write(BEGUN, b"")
    source, shape = attrs["normalization"]["source"], tuple(attrs["latent_shape"])
    if source == GIVEN:
        write_statistics(storage, *load_statistics(statistics_path(config), shape))
    elif source != COMPUTED:
        write_statistics(storage, torch.zeros(shape), torch.ones(shape))


def _plan(
    ranks: Ranks,
    storage: Storage,
    source: ImageSource,
    encoder: LatentEncoder,
    wanted: dict[str, Any],
    stop: Callable[[], None],
) -> Build | None:
    """What this rank has to build; None if the store is complete."""
    store = open_store(storage.url, allow_incomplete=True)
    check_compatible(store, identity(wanted))
    if store.complete:
        return None
    attrs, plan = store.attrs, read_plan(storage)
    job = EncodeJob(
        encoder,
        source,
        positions_by_path(store.paths, source, storage.url),
        attrs["views"],
        attrs["pixels"] is not None,
        attrs["encode_batch"],
        stop=stop,
    )
    return Build(ranks, storage, attrs, partial(encode_units, job), job.times, stop, kept=kept_record(plan))


def refuse_foreign(storage: Storage) -> None:
    """Raises UserError unless the place is empty, or holds the beginning of a store that was killed early."""
    other = next((key for key in storage.walk() if not key.startswith(f"{WORK}/")), None)
    if other is not None and storage.size(BEGUN) is None:
        raise UserError(
            f"cache.path {storage.url} is not empty ({other}) and holds no latent store",
            "an empty or new folder",
            "choose another cache.path",
        )


@contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
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
def stop_on_sigterm() -> Iterator[Callable[[], None]]:
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
