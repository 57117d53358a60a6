"""Encoded batches to shard files, in a thread of its own.

Shapes: B rows of a batch, C, H, W of a latent.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from rae_fast.latents.append import copy_kept_rows
from rae_fast.latents.build import POLL_S, Build
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.codecs import CodecError
from rae_fast.latents.encode import RawBatch
from rae_fast.latents.layout import PIXELS
from rae_fast.latents.records import Failure, ShardRecord
from rae_fast.latents.shard import ShardFile, write_shard
from rae_fast.latents.store import LatentStore
from rae_fast.runtime import compute_serially

WRITE_AHEAD = 3  # encoded batches that may wait for the disk


class ShardSink:
    """Writes batches in a thread, so that encoding never waits for the disk unless the disk is the slower of the two.

    Leaving the block without an exception waits for the last shard; with one, the shard in hand is dropped.

    Args:
        build: whose shards these are.
        finished: called with the record of each shard whose files are in place.
    """

    def __init__(self, build: Build, finished: Callable[[ShardRecord], None]) -> None:
        self.build, self._finished = build, finished
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
        self.build.times.write_s += time.monotonic() - started_s

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
        compute_serially()
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
            record, error = self._start(shard, files), CodecError()
            batch: RawBatch | None = first
            while batch is not None:
                write_batch(build, batch, files, record, error)
                if batch.last_of_unit:
                    break
                batch = self._queue.get()
                if batch is None or self._dropping:
                    raise _Dropped
        self._finished(complete_record(build, record, files, error))

    def _start(self, shard: int, files: dict[str, ShardFile]) -> ShardRecord:
        """The record of a new shard, with the rows that an append keeps already copied."""
        build, record = self.build, ShardRecord(shard)
        if build.kept is not None and build.kept.shard == shard:
            store = LatentStore(build.storage, build.attrs, None)
            for name, file in files.items():
                copy_kept_rows(store, build.planes[name], build.kept, file)
            record.valid += build.kept.valid
            record.failures += build.kept.failures
        return record


class _Dropped(Exception):
    """The build is ending before this shard is whole."""


def write_batch(
    build: Build, batch: RawBatch, files: dict[str, ShardFile], record: ShardRecord, error: CodecError
) -> None:
    """Normalize a batch, encode it and append it to its shard's files."""
    for name, file in files.items():  # a repair writes fewer planes than an import reads
        plane = batch.planes[name]
        if name == PIXELS:
            file.append(plane.cpu().numpy())
            continue
        z_BCHW = build.normalize(plane)
        keep_B = batch.valid_B.to(z_BCHW.device)
        z_BCHW[~keep_B] = 0
        stored, scales = build.codec.encode(z_BCHW)
        if keep_B.any():
            kept_scales = None if scales is None else scales[keep_B]
            error.update(z_BCHW[keep_B], build.codec.decode(stored[keep_B], kept_scales))
        file.append(stored.cpu().numpy(), None if scales is None else scales.cpu().numpy())
    record.valid += batch.valid_B.tolist()
    record.failures += [Failure(*failure) for failure in batch.failures]


def complete_record(build: Build, record: ShardRecord, files: dict[str, ShardFile], error: CodecError) -> ShardRecord:
    """The record of a shard whose files are in place."""
    for name, file in files.items():
        plane = build.planes[name]
        record.files[plane.shard_key(record.shard)] = (file.size, file.crc)
        record.row_crcs[name] = file.row_crcs
        if plane.scale_array:
            data = build.storage.read(plane.scale_key(record.shard))
            record.files[plane.scale_key(record.shard)] = (len(data), crc32c(data))
    record.codec_error = error.sums()
    return record
