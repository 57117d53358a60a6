"""The cache builder: images in, a verified store out, through crashes, on any number of ranks.

The unit of work is one shard with one owner. A killed build leaves finished shards, their records, and temporary files
that nobody reads; the same command, with any number of ranks, redoes what has no record. Nothing in the store depends
on when, how often or by how many ranks it was built.

Shapes: N rows, B rows of a batch, C, H, W of a latent.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images.index import ImageIndex, build_index
from rae_fast.latents import survey as first_pass
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.codecs import Codec, CodecError, get_codec
from rae_fast.latents.encode import EncodeJob, LatentEncoder, RawBatch, Unit, encode_units
from rae_fast.latents.finish import finish
from rae_fast.latents.layout import MANIFEST, PIXELS, WORK, Plane, planes_of, shard_count, shard_rows, single_chunk_key
from rae_fast.latents.lock import builder_lock
from rae_fast.latents.plan import COMPUTED, GIVEN, cache_path, describe, identity, positions_by_path, statistics_path
from rae_fast.latents.records import Failure, ShardRecord, committed_shards, read_record, write_record
from rae_fast.latents.shard import ShardFile, write_shard
from rae_fast.latents.storage import TEMPORARY, Storage, open_storage
from rae_fast.latents.store import LatentStore, check_compatible, create_store, open_store, read_attributes
from rae_fast.progress import Progress
from rae_fast.runtime import Ranks, pick_device

WRITE_AHEAD = 3  # encoded batches that may wait for the disk
POLL_S = 0.1


class Stopped(Exception):
    """SIGTERM arrived; the shard in hand was dropped, everything else is kept."""


@dataclass
class Build:
    """One rank's view of a build."""

    config: Config
    ranks: Ranks
    storage: Storage
    attrs: dict[str, Any]
    job: EncodeJob
    failures: int = 0
    normalizer: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    planes: dict[str, Plane] = field(init=False)
    codec: Codec = field(init=False)

    def __post_init__(self) -> None:
        attrs = self.attrs
        self.planes = planes_of(attrs["latent_shape"], attrs["views"], attrs["codec"], attrs["pixels"])
        self.codec = get_codec(attrs["codec"])

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        return range(shard_count(self.attrs["num_images"], self.attrs["shard_size"]))

    def rows(self, shard: int) -> range:
        """Rows of a shard."""
        return shard_rows(shard, self.attrs["shard_size"], self.attrs["num_images"])

    def mine(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that this rank owns."""
        return [unit for unit in units if unit.shard % self.ranks.world == self.ranks.rank]

    def progress(self, label: str, units: Sequence[Unit], missing: Sequence[Unit]) -> Progress:
        """Progress over the images of all units, of which some are still missing."""
        self.failures = 0
        total, left = (sum(len(unit.rows) for unit in part) for part in (units, missing))
        return Progress(total, "images", label, done=total - left, enabled=self.ranks.is_main)

    def advance(self, progress: Progress, batch: RawBatch) -> None:
        """Count a batch; the other ranks are taken to be as fast."""
        self.failures += len(batch.failures)
        progress.advance(batch.count * self.ranks.world, failures=self.failures, limit=self.job.times.limits())

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait for other ranks; files say when, so a build survives the loss of any of them.

        Raises:
            Stopped: SIGTERM arrived meanwhile.
        """
        while not ready():
            self.job.stop()
            time.sleep(POLL_S)


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
    started_s = time.monotonic()
    storage = open_storage(cache_path(config))
    read_attributes(storage)
    index = build_index(config.data)
    encoder = LatentEncoder(config.stage_1.params, config.cache.precision, _device(config, ranks))
    wanted = describe(config, index, encoder)
    prepared: list[Build | None] = []

    def prepare() -> None:
        prepared.append(_prepare(config, ranks, storage, index, encoder, wanted, stop))

    with _stop_on_sigterm() as stop, builder_lock(storage, ranks, prepare):
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
    return Build(config, ranks, storage, attrs, job)


def _begin(config: Config, storage: Storage, attrs: dict[str, Any], index: ImageIndex) -> None:
    """Write the head of a new store; given statistics come with it."""
    if storage.list():
        others = [key for key in storage.list() if not key.startswith(WORK)]
        if others:
            raise UserError(
                f"cache.path {storage.url} is not empty ({others[0]}) and holds no latent store",
                "an empty or new folder",
                "choose another cache.path",
            )
    source = attrs["normalization"]["source"]
    if source == GIVEN:
        mean, var = load_statistics(statistics_path(config), tuple(attrs["latent_shape"]))
        write_statistics(storage, mean, var)
    elif source != COMPUTED:
        write_statistics(storage, torch.zeros(attrs["latent_shape"]), torch.ones(attrs["latent_shape"]))
    create_store(storage, attrs, index.paths, index.labels)


def load_statistics(path: str, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance float32 [C, H, W] of a `stat.pt`; either may be missing in it (0 and 1 then).

    Raises:
        UserError: it is not such a file, or of another size.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: content.get(name) for name in ("mean", "var")}
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, _pickle_error()) as error:
        raise UserError(f"{path} cannot be read: {error}", "a stat.pt with `mean` and `var`") from error
    filled = []
    for name, default in (("mean", 0.0), ("var", 1.0)):
        value = torch.full(latent_shape, default) if found[name] is None else found[name].float()
        if tuple(value.shape) != tuple(latent_shape):
            raise UserError(f"{path}: {name} has shape {list(value.shape)}", f"{list(latent_shape)}")
        filled.append(value)
    return filled[0], filled[1]


def _pickle_error() -> type[Exception]:
    from pickle import UnpicklingError

    return UnpicklingError


def write_statistics(storage: Storage, mean: Tensor, var: Tensor) -> None:
    """Put mean and variance in place; the mean comes last and says that both are there."""
    for name, value in (("var", var), ("mean", mean)):
        storage.write(single_chunk_key(f"stats/{name}", 3), value.float().contiguous().numpy().astype("<f4").tobytes())


def _remove_strays(storage: Storage) -> None:
    """Delete what a killed build was writing."""
    for key in storage.list():
        if key.endswith(TEMPORARY):
            storage.delete(key)


def _statistics(build: Build) -> None:
    """Have mean and variance in place, computing them if that is what the store wants."""
    storage = build.storage
    key = single_chunk_key("stats/mean", 3)
    if storage.size(key) is not None:
        return
    first_pass.survey(build)
    if build.ranks.is_main:
        wanted = {first_pass.moments_key(unit.shard) for unit in first_pass.survey_units(build)}
        build.wait_for(lambda: wanted <= set(storage.list(first_pass.MOMENTS)))
        mean, var = first_pass.merge_moments(build).finish()
        write_statistics(storage, mean, var)
    else:
        build.wait_for(lambda: storage.size(key) is not None)


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
    with ShardSink(build) as sink:
        for batch in batches:
            sink.put(batch)
            build.advance(progress, batch)
    progress.close()


class ShardSink:
    """Writes batches in a thread, so that encoding never waits for the disk unless the disk is the slower of the two.

    Leaving the block without an exception waits for the last shard; with one, the shard in hand is dropped.
    """

    def __init__(self, build: Build) -> None:
        self.build = build
        self._queue: queue.Queue[RawBatch | None] = queue.Queue(WRITE_AHEAD)
        self._failed: list[BaseException] = []
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def __enter__(self) -> ShardSink:
        self._thread.start()
        return self

    def put(self, batch: RawBatch) -> None:
        """Hand over the next batch, in row order within its shard.

        Raises:
            UserError: writing failed, as on a full disk.
        """
        started_s = time.monotonic()
        while True:
            if self._failed:
                raise self._failed[0]
            try:
                self._queue.put(batch, timeout=POLL_S)
                break
            except queue.Full:
                continue
        self.build.job.times.write_s += time.monotonic() - started_s

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._dropping = kind is not None
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=POLL_S)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._failed and kind is None:
            raise self._failed[0]

    def _run(self) -> None:
        try:
            while (batch := self._queue.get()) is not None and not self._dropping:
                self._shard(batch)
        except _Dropped:
            return
        except Exception as error:  # raised again in the thread that hands over batches
            self._failed.append(error)

    def _shard(self, first: RawBatch) -> None:
        """Write one shard from its first batch on, then commit it."""
        build = self.build
        shard = first.unit.shard
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(write_shard(build.storage, plane, shard, build.attrs["shard_size"]))
                for name, plane in build.planes.items()
            }
            record, error = ShardRecord(shard), CodecError()
            batch: RawBatch | None = first
            while batch is not None:
                write_batch(build, batch, files, record, error)
                if batch.last_of_unit:
                    break
                batch = self._queue.get()
                if batch is None or self._dropping:
                    raise _Dropped
        commit(build, record, files, error)


class _Dropped(Exception):
    """The build is ending before this shard is whole."""


def write_batch(
    build: Build, batch: RawBatch, files: dict[str, ShardFile], record: ShardRecord, error: CodecError
) -> None:
    """Normalize a batch, encode it and append it to its shard's files."""
    for name, plane in batch.planes.items():
        if name == PIXELS:
            files[name].append(plane.cpu().numpy())
            continue
        z_BCHW = normalize(build, plane)
        keep_B = batch.valid_B.to(z_BCHW.device)
        z_BCHW[~keep_B] = 0
        stored, scales = build.codec.encode(z_BCHW)
        if keep_B.any():
            kept_scales = None if scales is None else scales[keep_B]
            error.update(z_BCHW[keep_B], build.codec.decode(stored[keep_B], kept_scales))
        files[name].append(stored.cpu().numpy(), None if scales is None else scales.cpu().numpy())
    record.valid += batch.valid_B.tolist()
    record.failures += [Failure(*failure) for failure in batch.failures]


def normalize(build: Build, raw_BCHW: Tensor) -> Tensor:
    """(z - mean) / sqrt(var + eps) in float32, on the device where the latents are."""
    mean, scale = _normalizer(build, raw_BCHW.device)
    return (raw_BCHW.float() - mean) / scale


def _normalizer(build: Build, device: torch.device) -> tuple[Tensor, Tensor]:
    cached = build.normalizer.get(device)
    if cached is None:
        store = LatentStore(build.storage, build.attrs, None)
        scale = (store.var + build.attrs["normalization"]["eps"]).sqrt()
        cached = build.normalizer[device] = (store.mean.to(device), scale.to(device))
    return cached


def commit(build: Build, record: ShardRecord, files: dict[str, ShardFile], error: CodecError) -> None:
    """Write a shard's record, now that its files are in place, and drop what waited un-normalized."""
    for name, file in files.items():
        plane = build.planes[name]
        record.files[plane.shard_key(record.shard)] = (file.size, file.crc)
        record.row_crcs[name] = file.row_crcs
        if plane.scale_array:
            data = build.storage.read(plane.scale_key(record.shard))
            record.files[plane.scale_key(record.shard)] = (len(data), crc32c(data))
    record.codec_error = error.sums()
    write_record(build.storage, record)
    for name in build.planes:
        build.storage.delete(first_pass.raw_key(name, record.shard))


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
