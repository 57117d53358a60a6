"""Batches of latents for training: order and view a pure function of (seed, epoch, row), ready before asked for.

Shapes: B images of one rank's micro-batch, C, H, W of a latent.
"""

from __future__ import annotations

import atexit
import queue
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_fast import rng
from rae_fast.config import Loader
from rae_fast.errors import UserError
from rae_fast.latents.native_reader import aligned_empty
from rae_fast.latents.order import Order, choose_rows
from rae_fast.latents.read_ahead import ReadAhead
from rae_fast.latents.reader import open_reader
from rae_fast.latents.store import LatentStore
from rae_fast.runtime import Ranks, compute_serially

FLIP_PROBABILITY = 0.5
# Views are drawn for many batches at once: each of the hundred small operations of a draw gives up the GIL, and beside
# a busy thread waits up to 5 ms to have it back.
BATCHES_DRAWN = 64


# How long a thread that runs Python may keep the GIL from one that wants it. At Python's own 5 ms the loader's thread
# waits as long as it reads a batch each time that it comes back from C.
GIL_SWITCH_S = 5e-4


@dataclass(frozen=True)
class LatentBatch:
    """One micro-batch of one rank.

    Attributes:
        latents_BCHW: normalized latents, float32, on the loader's device.
        labels_B: int64, on the loader's device.
        index_B: int64, rows of the store, the key of all per-sample randomness; on the loader's device.
        epoch: which epoch it belongs to; an int64 tensor [1] on an XLA device.
    """

    latents_BCHW: Tensor
    labels_B: Tensor
    index_B: Tensor
    epoch: int | Tensor


class BatchStream(ABC):
    """An endless stream of batches that a thread prepares ahead: what the cached and the online loader share.

    The images of micro-batch j of an epoch are order[j G : (j + 1) G], G = batch_size x world, and rank r takes the
    r-th piece of them: so the global stream is the same for any number of ranks.

    Args:
        order: the rows of each epoch.
        batch_size: images of one rank's micro-batch.
        ranks: which piece of each global batch to take.
        prefetch: batches kept ready.
    """

    def __init__(self, order: Order, batch_size: int, ranks: Ranks, prefetch: int) -> None:
        self.order, self.batch_size, self.ranks, self.prefetch = order, batch_size, ranks, max(1, prefetch)
        if order.length == 0:
            raise UserError(
                f"{len(order.rows_M)} images are fewer than the {order.multiple} of one step",
                f"at most {len(order.rows_M)} images a step",
                "lower training.global_batch_size",
            )
        self.wait_s = 0.0
        self._first_s: float | None = None
        self._epoch, self._position = 0, 0
        self._producer: _Producer | None = None

    @property
    def epoch_images(self) -> int:
        """Images of one epoch over all ranks."""
        return self.order.length

    @property
    def epoch_batches(self) -> int:
        """Micro-batches of one epoch."""
        return self.order.length // (self.batch_size * self.ranks.world)

    @property
    def wait_share(self) -> float:
        """Share of the time since the first batch that the caller spent waiting for data."""
        if self._first_s is None:
            return 0.0
        return self.wait_s / max(time.monotonic() - self._first_s, 1e-9)

    def state(self) -> tuple[int, int]:
        """(epoch, images of it that all ranks together have been given): all that a resume needs."""
        return self._epoch, self._position

    def seek(self, epoch: int, position: int) -> None:
        """Go on after `position` images of `epoch`.

        Raises:
            UserError: no batch begins there.
        """
        step = self.batch_size * self.ranks.world
        if epoch < 0 or position < 0 or position % step or position > self.order.length:
            raise UserError(
                f"position {position} of epoch {epoch}",
                f"a multiple of the {step} images of a batch, at most {self.order.length}",
                "resume with the data and the batch size that wrote the checkpoint",
            )
        self.close()
        self._epoch, self._position = (epoch + 1, 0) if position == self.order.length else (epoch, position)

    def __iter__(self) -> Iterator[LatentBatch]:
        return self

    def __next__(self) -> LatentBatch:
        if self._producer is None:
            self._producer = _Producer(self, self._epoch, self._position)
        asked_s = time.monotonic()
        batch = self._producer.take()
        if self._first_s is None:
            # The first batch has nobody to hide behind; it says nothing about the steps that follow.
            self._first_s = time.monotonic()
        else:
            self.wait_s += time.monotonic() - asked_s
        self._position += self.batch_size * self.ranks.world
        if self._position == self.order.length:
            self._epoch, self._position = self._epoch + 1, 0
        return batch

    def close(self) -> None:
        """Stop the thread; iterating again starts anew from `state()`."""
        if self._producer is not None:
            self._producer.stop()
            self._producer = None

    @abstractmethod
    def _prepare(self, epoch: int, position: int) -> Iterator[LatentBatch]:
        """Batches from a position on; runs in the producer's thread."""

    def _deliver(self, batch: LatentBatch) -> LatentBatch:
        """Last step, in the caller's thread."""
        return batch


class _Producer:
    """Runs a stream's `_prepare` in a thread, `prefetch` batches ahead."""

    def __init__(self, stream: BatchStream, epoch: int, position: int) -> None:
        self._stream = stream
        self._queue: queue.Queue[Any] = queue.Queue(stream.prefetch)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(epoch, position), name="latent-loader", daemon=True)
        sys.setswitchinterval(min(sys.getswitchinterval(), GIL_SWITCH_S))
        self._thread.start()
        # A thread that is still inside torch when Python ends takes the process down by SIGABRT, exit status and all.
        atexit.register(self.stop)

    def take(self) -> LatentBatch:
        """The next batch; raises what the thread raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)
            raise item
        return self._stream._deliver(item)

    def stop(self) -> None:
        """End the thread and drop what it prepared."""
        self._stopping.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        atexit.unregister(self.stop)

    def _run(self, epoch: int, position: int) -> None:
        compute_serially()
        try:
            for batch in self._stream._prepare(epoch, position):
                self._put(batch)
                if self._stopping.is_set():
                    return
        except Exception as error:  # handed to the caller's thread, which raises it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


class LatentLoader(BatchStream):
    """Batches from a latent store.

    Args:
        store: a complete store.
        batch_size: images of one rank's micro-batch.
        seed: with epoch and row it decides order and view.
        ranks: this process among all.
        shuffle: "global", "block" or "none".
        block_size: rows of a block of the block shuffle.
        flip: serve the `hflip` view of half of the images, if the store has it.
        images_per_step: images of one optimizer step over all ranks and micro-batches; an epoch is cut to a multiple.
        classes: only these classes.
        balanced: every class equally often.
        device: where batches are wanted.
        prefetch: batches kept ready.
        reader: as `loader.reader`.
        verify: check each row's checksum before serving it.

    Raises:
        UserError: too few images for a step, no image of these classes, or no such reader.
    """

    def __init__(
        self,
        store: LatentStore,
        *,
        batch_size: int,
        seed: int = 0,
        ranks: Ranks | None = None,
        shuffle: str = "global",
        block_size: int = 4096,
        flip: bool = True,
        images_per_step: int | None = None,
        classes: Sequence[int] | None = None,
        balanced: bool = False,
        device: torch.device | str = "cpu",
        prefetch: int = 4,
        reader: str = "auto",
        verify: bool = True,
    ) -> None:
        ranks = ranks or Ranks()
        rows = choose_rows(store.labels, store.valid, classes, store.url)
        order = Order(
            rows,
            store.labels[rows],
            seed,
            shuffle,
            block_size,
            balanced,
            images_per_step or batch_size * ranks.world,
        )
        super().__init__(order, batch_size, ranks, prefetch)
        self.store, self.seed, self.device = store, seed, torch.device(device)
        self.planes = [store.planes[view] for view in store.views]
        self.flip = flip and set(store.views) == {"original", "hflip"}
        self._labels = store.labels.astype(np.int64)
        self._reader = open_reader(store, reader, verify=verify, in_blocks=shuffle == "block")
        self._ahead = ReadAhead(order, self._prefetch) if shuffle == "block" else None

    def views_of(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Which view each row is served in, int64 [B], an index into the store's views."""
        if not self.flip:
            return np.zeros(len(rows), np.int64)
        u_B = rng.uniform(self.seed, epoch, torch.from_numpy(rows), rng.Stream.VIEW)
        return (u_B < FLIP_PROBABILITY).numpy().astype(np.int64)

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(epoch, this rank's rows int64 [B], their views int64 [B]) from a position on, without end."""
        step = self.batch_size * self.ranks.world
        mine = slice(self.ranks.rank * self.batch_size, (self.ranks.rank + 1) * self.batch_size)
        while True:
            order_E = self.order.epoch(epoch)
            for first in range(position, self.order.length, step * BATCHES_DRAWN):
                several = order_E[first : first + step * BATCHES_DRAWN].reshape(-1, step)[:, mine]
                which = self.views_of(epoch, several.reshape(-1)).reshape(several.shape)
                for number, rows in enumerate(several):
                    if self._ahead is not None:
                        self._ahead.reach(epoch, first + number * step)
                    yield epoch, rows, which[number]
            epoch, position = epoch + 1, 0

    def _prepare(self, epoch: int, position: int) -> Iterator[Any]:
        ring = _Ring(self) if self.device.type == "cuda" else None
        stored, scales = (None, None) if ring is not None else self._buffers(pinned=False)
        for at_epoch, rows, which in self._batches(epoch, position):
            index_B, labels_B = torch.from_numpy(rows), torch.from_numpy(self._labels[rows])
            if ring is not None:
                yield ring.load(rows, which, labels_B, at_epoch)
                continue
            assert stored is not None
            self._gather(rows, which, stored, scales)
            if self.device.type == "xla":
                yield _OnHost(self, stored, scales, labels_B, index_B, at_epoch)
                stored, scales = self._buffers(pinned=False)  # the caller's thread still has the others to copy
                continue
            # Decoding copies, so that the buffer is free again.
            yield LatentBatch(self.store.codec.decode(stored, scales), labels_B, index_B, at_epoch)

    def _prefetch(self, epoch: int, rows: np.ndarray) -> None:
        self._reader.prefetch(rows, self.planes, self.views_of(epoch, rows))

    def _buffers(self, pinned: bool) -> tuple[Tensor, Tensor | None]:
        """Room for one batch as it is stored: [B, C, H, W] and, for codecs with scales, float16 [B, C]."""
        plane = self.planes[0]
        shape = (self.batch_size, *plane.row_shape)
        if pinned:
            stored = torch.empty(shape, dtype=self.store.codec.torch_dtype, pin_memory=True)
        else:
            stored = torch.from_numpy(aligned_empty(shape, plane.dtype))
        if not plane.scale_array:
            return stored, None
        return stored, torch.empty(self.batch_size, plane.row_shape[0], dtype=torch.float16, pin_memory=pinned)

    def _gather(self, rows: np.ndarray, which: np.ndarray, stored: Tensor, scales: Tensor | None) -> None:
        self._reader.gather(rows, self.planes, which, stored.numpy(), None if scales is None else scales.numpy())

    def _deliver(self, batch: Any) -> LatentBatch:
        return batch if isinstance(batch, LatentBatch) else batch.arrive()


@dataclass(frozen=True)
class _InFlight:
    """A batch whose copy to the GPU may still be running on the side stream."""

    batch: LatentBatch
    copied: torch.cuda.Event

    def arrive(self) -> LatentBatch:
        """Make the caller's stream wait for the copy; the host does not wait."""
        stream = torch.cuda.current_stream(self.batch.latents_BCHW.device)
        stream.wait_event(self.copied)
        for tensor in (self.batch.latents_BCHW, self.batch.labels_B, self.batch.index_B):
            tensor.record_stream(stream)
        return self.batch


@dataclass(frozen=True)
class _OnHost:
    """A batch for an XLA device, to which only the caller's thread may send."""

    loader: LatentLoader
    stored: Tensor
    scales: Tensor | None
    labels_B: Tensor
    index_B: Tensor
    epoch: int

    def arrive(self) -> LatentBatch:
        """Copy, and de-quantize on the device; the epoch goes as data: XLA compiles small numbers into graphs."""
        device = self.loader.device
        scales = None if self.scales is None else self.scales.to(device)
        latents = self.loader.store.codec.decode(self.stored.to(device), scales)
        epoch = torch.tensor([self.epoch]).to(device)
        return LatentBatch(latents, self.labels_B.to(device), self.index_B.to(device), epoch)


class _Ring:
    """Pinned buffers in turn, each free again when its copy to the GPU has ended."""

    def __init__(self, loader: LatentLoader) -> None:
        self.loader = loader
        self.stream = torch.cuda.Stream(loader.device)
        self.slots = [(*loader._buffers(pinned=True), torch.cuda.Event()) for _ in range(2)]
        self.turn = 0

    def load(self, rows: np.ndarray, which: np.ndarray, labels_B: Tensor, epoch: int) -> _InFlight:
        """Read into the next buffer, then copy and de-quantize on the side stream."""
        stored, scales, free = self.slots[self.turn % len(self.slots)]
        self.turn += 1
        free.synchronize()
        self.loader._gather(rows, which, stored, scales)
        device = self.loader.device
        with torch.cuda.stream(self.stream):
            on_device = stored.to(device, non_blocking=True)
            scales_on_device = None if scales is None else scales.to(device, non_blocking=True)
            free.record(self.stream)
            latents = self.loader.store.codec.decode(on_device, scales_on_device)
            batch = LatentBatch(
                latents,
                labels_B.pin_memory().to(device, non_blocking=True),
                torch.from_numpy(rows).pin_memory().to(device, non_blocking=True),
                epoch,
            )
            copied = torch.cuda.Event()
            copied.record(self.stream)
        return _InFlight(batch, copied)


def build_loader(
    loader: Loader,
    store: LatentStore,
    *,
    batch_size: int,
    images_per_step: int | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
) -> LatentLoader:
    """The loader that a config's `loader` section asks for, over an open store."""
    return LatentLoader(
        store,
        batch_size=batch_size,
        seed=seed,
        ranks=ranks,
        images_per_step=images_per_step,
        device=device,
        **loader_settings(loader),
    )


def loader_settings(loader: Loader) -> dict[str, Any]:
    """A config's `loader` section as arguments of `LatentLoader`."""
    names = ("shuffle", "block_size", "flip", "classes", "balanced", "prefetch", "reader", "verify")
    return {name: getattr(loader, name) for name in names}
