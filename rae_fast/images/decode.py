"""Images to crops: every requested position comes back once, in order, whatever state its file is in.

One producer thread moves batches through three stages that overlap: reading and pre-checking batch k + 2, DALI decoding
batch k + 1, cropping batch k. Anything that DALI might choke on goes to PIL; if DALI fails a batch all the same, the
batch goes image by image through PIL and the pipeline is built anew. What PIL cannot read either is a failure record.

Shapes: B images of a batch, S side of the crop, H, W height and width of a decoded image.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rae_fast import rng
from rae_fast.errors import UserError
from rae_fast.images.crop import CropPlan, center_plan, crop_pil, random_plan
from rae_fast.images.dali import DaliDecoder
from rae_fast.images.entries import ImageIndex, ReadError
from rae_fast.images.precheck import decode_pil, fit_for_dali

CROP_MODES = ("exact", "fast")
READ_CHUNK = 8  # images a reading thread fetches in a row
BATCHES_READY = 2  # finished batches that wait for the consumer
DEFAULT_BATCH = 128


class Failure(NamedTuple):
    """An image that could not be had: its position in the index, its path, and why, in one line."""

    position: int
    path: str
    reason: str


class ImageBatch(NamedTuple):
    """Crops in the order of the requested positions; rows that are not valid are zero and have a failure record."""

    positions_B: Tensor
    images_B3SS: Tensor
    valid_B: Tensor
    failures: list[Failure]


@dataclass(frozen=True)
class RandomCrop:
    """Draws of the decoder's training crop: a pure function of (seed, epoch, position)."""

    short_side: int
    seed: int
    epoch: int = 0

    def draws(self, positions_B: np.ndarray) -> np.ndarray:
        """Two uniforms an image, float32 [B, 2]: where the window goes, from the top and from the left."""
        index_B = torch.from_numpy(positions_B)
        return rng.uniform(self.seed, self.epoch, index_B, rng.Stream.CROP, (2,)).numpy()

    def plan(self, width: int, height: int, size: int, draw: np.ndarray) -> CropPlan:
        """The plan for one image."""
        return random_plan(width, height, size, self.short_side, float(draw[0]), float(draw[1]))


@dataclass
class _Job:
    """One batch on its way through the stages."""

    positions_B: np.ndarray
    draws_B: np.ndarray | None
    images_B3SS: Tensor
    encoded: list[bytes | None]
    reasons: list[str | None]
    slots: list[int] = field(default_factory=list)  # rows that DALI decodes
    tasks: list[Future] = field(default_factory=list)


class ImagePipeline:
    """Iterates `ImageBatch`es over `positions` of an index.

    Args:
        index: the images.
        positions: which of them, in which order; None for all.
        image_size: side S of the crop.
        crop_mode: `exact`, the reference's bytes, or `fast`, nvJPEG on a GPU (the same as `exact` without one).
        batch_size: images a batch.
        device: where the crops are wanted.
        threads: CPU threads for decoding, and as many for cropping.
        hw_decoder_load: share of JPEGs for the GPU's hardware decoder (`fast`).
        random_crop: draws of the training crop; None for the centre crop.

    Raises:
        UserError: the crop mode is unknown.
    """

    def __init__(
        self,
        index: ImageIndex,
        positions: Sequence[int] | np.ndarray | None = None,
        image_size: int = 256,
        crop_mode: str = "exact",
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        *,
        hw_decoder_load: float = 0.65,
        random_crop: RandomCrop | None = None,
    ) -> None:
        if crop_mode not in CROP_MODES:
            raise UserError(f"data.crop is {crop_mode!r}", f"one of {', '.join(CROP_MODES)}")
        self.index = index
        self.positions = np.arange(len(index)) if positions is None else np.asarray(positions, np.int64)
        self.image_size, self.crop_mode = image_size, crop_mode
        self.batch_size = batch_size or DEFAULT_BATCH
        self.device = torch.device(device)
        self.threads = threads or len(os.sched_getaffinity(0))
        self._hw_decoder_load = hw_decoder_load
        self._random_crop = random_crop
        self.rebuilds = 0
        self.idle_s = 0.0  # time for which finished batches waited for the consumer

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        ready: queue.Queue = queue.Queue(BATCHES_READY)
        stop = threading.Event()
        producer = threading.Thread(target=self._produce, args=(ready, stop), name="decode", daemon=True)
        producer.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while producer.is_alive():
                try:
                    ready.get(timeout=0.05)
                except queue.Empty:
                    continue

    def _produce(self, ready: queue.Queue, stop: threading.Event) -> None:
        """Body of the producer thread; the consumer gets its exceptions."""
        try:
            with ThreadPoolExecutor(self.threads, "crop") as pool, ThreadPoolExecutor(max(8, self.threads)) as io:
                for batch in self._batches(pool, io):
                    start_s = time.monotonic()
                    ready.put(batch)
                    self.idle_s += time.monotonic() - start_s
                    if stop.is_set():
                        break
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def _batches(self, pool: ThreadPoolExecutor, io: ThreadPoolExecutor) -> Iterator[ImageBatch]:
        decoder = None
        decoding: _Job | None = None
        cropping: deque[_Job] = deque()
        for job in self._read_ahead(io):
            if decoder is None and job.slots:
                decoder = DaliDecoder(self.batch_size, self.threads)
            images = self._decoded(decoder, decoding)
            if job.slots:
                decoder.submit([job.encoded[slot] for slot in job.slots])
            if decoding:
                self._start_crops(pool, decoding, images)
                cropping.append(decoding)
            decoding = job
            if len(cropping) > 1:
                yield self._finish(cropping.popleft())
        if decoding:
            self._start_crops(pool, decoding, self._decoded(decoder, decoding))
            cropping.append(decoding)
        while cropping:
            yield self._finish(cropping.popleft())

    def _read_ahead(self, io: ThreadPoolExecutor) -> Iterator[_Job]:
        """Jobs with their bytes read, one being read while another is worked on."""
        reading: deque[tuple[_Job, list[Future]]] = deque()
        for start in range(0, len(self.positions), self.batch_size):
            job = self._new_job(self.positions[start : start + self.batch_size])
            rows = range(len(job.positions_B))
            chunks = [rows[i : i + READ_CHUNK] for i in range(0, len(rows), READ_CHUNK)]
            reading.append((job, [io.submit(self._read, job, chunk) for chunk in chunks]))
            if len(reading) > 1:
                yield self._with_bytes(*reading.popleft())
        while reading:
            yield self._with_bytes(*reading.popleft())

    def _new_job(self, positions_B: np.ndarray) -> _Job:
        count, side = len(positions_B), self.image_size
        draws_B = self._random_crop.draws(positions_B) if self._random_crop else None
        images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        return _Job(positions_B, draws_B, images, [None] * count, [None] * count)

    def _read(self, job: _Job, rows: range) -> list[int]:
        """Read the bytes of some rows; returns those that DALI may have."""
        fit = []
        for row in rows:
            try:
                data = self.index.read(int(job.positions_B[row]))
            except ReadError as error:
                job.reasons[row] = str(error)
                continue
            job.encoded[row] = data
            if fit_for_dali(data):
                fit.append(row)
        return fit

    @staticmethod
    def _with_bytes(job: _Job, chunks: list[Future]) -> _Job:
        job.slots = [row for chunk in chunks for row in chunk.result()]
        return job

    def _decoded(self, decoder: DaliDecoder | None, job: _Job | None) -> list[np.ndarray]:
        """DALI's images of a job; none, and its rows left to PIL, if DALI lost the batch."""
        if job is None or not job.slots:
            return []
        try:
            return decoder.result()
        except RuntimeError:
            self.rebuilds += 1
            job.slots = []
            return []

    def _start_crops(self, pool: ThreadPoolExecutor, job: _Job, images: list[np.ndarray]) -> None:
        for slot, image_HW3 in zip(job.slots, images, strict=True):
            job.encoded[slot] = None
            job.tasks.append(pool.submit(self._crop, job, slot, image_HW3))
        for row, data in enumerate(job.encoded):
            if data is not None:
                job.tasks.append(pool.submit(self._crop_with_pil, job, row, data))

    def _crop(self, job: _Job, row: int, image_HW3: np.ndarray) -> None:
        height, width = image_HW3.shape[:2]
        try:
            plan = self._plan(width, height, job, row)
        except ValueError as error:
            job.reasons[row] = str(error)
            return
        cropped = np.asarray(crop_pil(Image.fromarray(image_HW3), plan))
        job.images_B3SS[row] = torch.from_numpy(cropped.copy()).permute(2, 0, 1)

    def _plan(self, width: int, height: int, job: _Job, row: int) -> CropPlan:
        if self._random_crop is None:
            return center_plan(width, height, self.image_size)
        return self._random_crop.plan(width, height, self.image_size, job.draws_B[row])

    def _crop_with_pil(self, job: _Job, row: int, data: bytes) -> None:
        try:
            image_HW3 = decode_pil(data)
        except ReadError as error:
            job.reasons[row] = str(error)
            return
        self._crop(job, row, image_HW3)

    def _finish(self, job: _Job) -> ImageBatch:
        for task in job.tasks:
            task.result()
        failures = [
            Failure(position, self.index.paths[position], reason)
            for position, reason in zip(job.positions_B.tolist(), job.reasons, strict=True)
            if reason is not None
        ]
        valid_B = torch.tensor([reason is None for reason in job.reasons])
        images = job.images_B3SS.to(self.device)
        return ImageBatch(torch.from_numpy(job.positions_B), images, valid_B, failures)
