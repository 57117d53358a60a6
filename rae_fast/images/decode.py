"""Images to crops: every requested position comes back once, in order, whatever state its file is in.

One producer thread moves batches through stages that overlap: reading and pre-checking, DALI decoding, cropping.
Anything that DALI might choke on goes to PIL; if DALI loses a part all the same, it goes image by image through PIL and
the pipeline is built anew. What PIL cannot read either is a failure record.

Shapes: B images of a batch, S side of the crop, H, W height and width of a decoded image.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rae_fast import rng
from rae_fast.errors import UserError
from rae_fast.images.crop import CropPlan, center_plan, random_plan
from rae_fast.images.dali import DaliDecoder
from rae_fast.images.entries import ImageIndex, ReadError
from rae_fast.images.feeder import Feeder, Job, Part
from rae_fast.images.precheck import decode_pil
from rae_fast.images.resample import crop_into, native_or_none
from rae_fast.runtime import compute_serially, give_way

CROP_MODES = ("exact", "fast")
BATCHES_READY = 2  # finished batches that wait for the consumer
DEFAULT_BATCH = 128  # at 256 pixels; fewer where crops are larger
DEFAULT_SIDE = 256


class Failure(NamedTuple):
    """An image that could not be had: its position in the index, its path, and why, in one line."""

    position: int
    path: str
    reason: str


class ImageBatch(NamedTuple):
    """Crops in the order of the requested positions; rows that are not valid are zero and have a failure record.

    positions_B int64 and valid_B bool are on the CPU, images_B3SS uint8 on the pipeline's device.
    """

    positions_B: Tensor
    images_B3SS: Tensor
    valid_B: Tensor
    failures: list[Failure]


@dataclass(frozen=True)
class RandomCrop:
    """The decoder's training crop: resize to `short_side`, then a window drawn from (seed, epoch, position) alone."""

    short_side: int
    seed: int
    epoch: int = 0

    def draws(self, positions_B: np.ndarray) -> np.ndarray:
        """Where the windows go, from the top and from the left: float32 [B, 2] in [0, 1)."""
        return rng.uniform(self.seed, self.epoch, torch.from_numpy(positions_B), rng.Stream.CROP, (2,)).numpy()


class ImagePipeline:
    """Iterates `ImageBatch`es over `positions` of an index.

    Args:
        index: the images.
        positions: which of them, in which order; None for all.
        image_size: side S of the crop.
        crop_mode: `exact`, the reference's bytes, or `fast`, decoded by nvJPEG on a GPU (without one: as `exact`).
        batch_size: images a batch; None: by image size.
        device: where the crops are wanted.
        threads: CPU threads for decoding, and as many for cropping; None: this process's share of the cores.
        hw_decoder_load: share of JPEGs for the GPU's hardware decoder (`fast`).
        random_crop: the training crop; None for the centre crop.
        gives_way: leave the cores to the caller's thread where both want them; for a caller that trains meanwhile.

    Attributes:
        rebuilds: how often DALI lost a part and was built anew.
        idle_s: for how long finished batches waited for the consumer; near 0, decoding is what limits.

    Raises:
        UserError: the crop mode is unknown.
    """

    def __init__(
        self,
        index: ImageIndex,
        positions: Sequence[int] | np.ndarray | None = None,
        image_size: int = DEFAULT_SIDE,
        crop_mode: str = "exact",
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        *,
        hw_decoder_load: float = 0.65,
        random_crop: RandomCrop | None = None,
        gives_way: bool = False,
    ) -> None:
        if crop_mode not in CROP_MODES:
            raise UserError(f"data.crop is {crop_mode!r}", f"one of {', '.join(CROP_MODES)}")
        self.index = index
        self.positions = np.arange(len(index)) if positions is None else np.asarray(positions, np.int64)
        self.image_size, self.crop_mode = image_size, crop_mode
        self.batch_size = batch_size or max(16, min(DEFAULT_BATCH, DEFAULT_BATCH * DEFAULT_SIDE**2 // image_size**2))
        self.device = torch.device(device)
        self.threads = threads or default_threads()
        self.rebuilds = 0
        self.idle_s = 0.0
        self._hw_decoder_load, self._random_crop, self._gives_way = hw_decoder_load, random_crop, gives_way
        self._on_gpu = self.device.type == "cuda"
        self._mixed = crop_mode == "fast" and self._on_gpu
        # The native crop costs less than the way of a whole image to the GPU; PIL's does not.
        self._crops_on_device = self._mixed or (native_or_none() is None and self._on_gpu)

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        ready: queue.Queue = queue.Queue(BATCHES_READY)
        stop = threading.Event()
        producer = threading.Thread(target=self._produce, args=(ready, stop), name="decode", daemon=True)
        producer.start()

        def halt() -> None:
            stop.set()
            while producer.is_alive():
                with suppress(queue.Empty):
                    ready.get_nowait()  # it may be waiting for room
                producer.join(timeout=0.05)

        # As in latents/loader.py: no thread may be inside DALI or torch when Python ends.
        atexit.register(halt)
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if self._on_gpu:
                    # Made on another stream: its memory must not be used again before ours is done with it.
                    item.images_B3SS.record_stream(torch.cuda.current_stream(self.device))
                yield item
        finally:
            halt()
            atexit.unregister(halt)

    def _produce(self, ready: queue.Queue, stop: threading.Event) -> None:
        """Body of the producer thread. Whatever it raises is raised again where the batches are consumed."""
        compute_serially()
        if self._gives_way:
            give_way()
        try:
            stages = _Stages(self)
            with (
                ThreadPoolExecutor(self.threads, "crop") as pool,
                ThreadPoolExecutor(max(8, self.threads), "read") as io,
            ):
                for batch in stages.batches(pool, io):
                    start_s = time.monotonic()
                    ready.put(batch)
                    self.idle_s += time.monotonic() - start_s
                    if stop.is_set():
                        break
            ready.put(None)
        except BaseException as error:
            ready.put(error)


class _Stages:
    """The stages of one run over the positions, all driven by the producer thread."""

    def __init__(self, pipeline: ImagePipeline) -> None:
        self._of = pipeline
        self._random_crop: RandomCrop | None = pipeline._random_crop
        self._decoder: DaliDecoder | None = None
        self._stream = torch.cuda.Stream(pipeline.device) if pipeline._on_gpu else None

    def batches(self, pool: ThreadPoolExecutor, io: ThreadPoolExecutor) -> Iterator[ImageBatch]:
        """While part k is decoded, part k - 1 is cropped and the batch after k is read."""
        of = self._of
        feeder = Feeder(of.index, of.positions, of.batch_size, of.image_size, pinned=of._on_gpu)
        cropping: deque[Job] = deque()
        decoding: Part | None = None
        for part in chain(feeder.parts(io), (None,)):
            images = self._decoded(decoding)
            if part is not None:
                self._submit(part)
            if decoding is not None:
                self._start_crops(pool, decoding, images)
                if decoding.last:
                    cropping.append(decoding.job)
            decoding = part
            while len(cropping) > (part is not None):
                yield self._finish(cropping.popleft())

    def _submit(self, part: Part) -> None:
        if not part.rows:
            return
        if self._decoder is None:
            of = self._of
            device_id = (of.device.index or 0) if of._mixed else None
            self._decoder = DaliDecoder(of.batch_size, of.threads, device_id, of._hw_decoder_load)
        self._decoder.submit([part.job.encoded[row] for row in part.rows])

    def _decoded(self, part: Part | None) -> list[Any]:
        """DALI's images for the rows of a part; none if DALI lost it, and then its rows are left to PIL."""
        if part is None or not part.rows:
            return []
        try:
            return self._decoder.result(self._stream if self._of._mixed else None)
        except RuntimeError:
            self._of.rebuilds += 1
            part.rows.clear()
            return []

    def _start_crops(self, pool: ThreadPoolExecutor, part: Part, images: list[Any]) -> None:
        job = part.job
        self._wait(job)  # for the part before: no more than two parts are ever held
        if self._random_crop and job.draws_B2 is None:
            job.draws_B2 = self._random_crop.draws(job.positions_B)
        for row in part.rows:
            job.encoded[row] = None
        if self._of._crops_on_device:
            self._crop_on_device(job, part.rows, images)
        else:
            for row, image in zip(part.rows, images, strict=True):
                job.tasks.append(pool.submit(self._crop, job, row, np.from_dlpack(image)))
        if part.last:
            left = [(row, data) for row, data in enumerate(job.encoded) if data is not None]
            job.tasks += [pool.submit(self._crop_with_pil, job, row, data) for row, data in left]

    def _plan(self, job: Job, row: int, height: int, width: int) -> CropPlan | None:
        """The plan of one image's crop; None, and a reason recorded, if there can be none."""
        size, random = self._of.image_size, self._random_crop
        try:
            if random is None:
                return center_plan(width, height, size)
            return random_plan(width, height, size, random.short_side, *job.draws_B2[row].tolist())
        except ValueError as error:
            job.reasons[row] = str(error)
            return None

    def _crop(self, job: Job, row: int, image_HW3: np.ndarray) -> None:
        if plan := self._plan(job, row, *image_HW3.shape[:2]):
            crop_into(image_HW3, plan, job.images_B3SS[row].numpy())

    def _crop_with_pil(self, job: Job, row: int, data: bytes) -> None:
        try:
            image_HW3 = decode_pil(data)
        except ReadError as error:
            job.reasons[row] = str(error)
        else:
            self._crop(job, row, image_HW3)

    def _crop_on_device(self, job: Job, rows: Sequence[int], images: Sequence[Any]) -> None:
        """Crop DALI's images on the pipeline's device, in the stream that DALI hands them over in."""
        from rae_fast.images.device_crop import crop_batch  # imports Triton

        with self._in_stream():
            images_HW3 = [torch.from_dlpack(image).to(self._of.device) for image in images]
            plans = [self._plan(job, row, *image.shape[:2]) for row, image in zip(rows, images_HW3, strict=True)]
            good = [i for i, plan in enumerate(plans) if plan is not None]
            if good:
                crops = crop_batch([images_HW3[i] for i in good], [plans[i] for i in good], self._of.image_size)
                job.crops_on_device.append(([rows[i] for i in good], crops))
                job.read_on_device += images_HW3

    def _wait(self, job: Job) -> None:
        """Until what has been started for a job is done; DALI may then have the memory of its images back."""
        for task in job.tasks:
            task.result()
        if self._stream is not None:
            self._stream.synchronize()
        job.read_on_device.clear()

    def _finish(self, job: Job) -> ImageBatch:
        self._wait(job)
        for row, reason in enumerate(job.reasons):
            if reason is not None:
                job.images_B3SS[row].zero_()
        with self._in_stream():
            images_B3SS = job.images_B3SS.to(self._of.device, non_blocking=True)
            for rows, crops in job.crops_on_device:
                images_B3SS[torch.tensor(rows, device=images_B3SS.device)] = crops
        if self._stream is not None:
            self._stream.synchronize()
        failures = [
            Failure(position, self._of.index.paths[position], reason)
            for position, reason in zip(job.positions_B.tolist(), job.reasons, strict=True)
            if reason is not None
        ]
        valid_B = torch.tensor([reason is None for reason in job.reasons])
        return ImageBatch(torch.tensor(job.positions_B), images_B3SS, valid_B, failures)

    def _in_stream(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def default_threads() -> int:
    """Cores that this process may use, shared among the processes that a launcher started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
