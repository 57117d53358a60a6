"""The feeder: bytes of the requested positions, read ahead, pre-checked, and cut into what DALI takes at once.

Shapes: B images of a batch, S side of the crop.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rae_fast.images.entries import ImageIndex, ReadError
from rae_fast.images.precheck import pixels_for_dali

READ_CHUNK = 8  # images that a reading thread fetches in a row
# Decoded images that DALI may hold at once: 288 MB, and as much again while they are being cropped.
MAX_PART_PIXELS = 96_000_000


@dataclass
class Job:
    """One batch on its way through the stages. A row whose bytes are still there has not been cropped."""

    positions_B: np.ndarray
    images_B3SS: Tensor
    encoded: list[bytes | None]
    reasons: list[str | None]
    pixels: list[int]
    draws_B2: np.ndarray | None = None  # of a random crop
    tasks: list[Future] = field(default_factory=list)
    crops_on_device: list[tuple[list[int], Tensor]] = field(default_factory=list)
    read_on_device: list[Tensor] = field(default_factory=list)  # DALI's images, until the crops are made


class Part(NamedTuple):
    """Rows of a job that DALI decodes in one go (perhaps none), and whether they are the last of it."""

    job: Job
    rows: list[int]
    last: bool


class Feeder:
    """Reads batches of `positions` in order, one batch ahead.

    Args:
        index: where the bytes come from.
        positions: which images.
        batch_size: images a batch.
        image_size: side S of the crops that the job will hold.
        pinned: whether they are copied to a GPU.
    """

    def __init__(
        self, index: ImageIndex, positions: np.ndarray, batch_size: int, image_size: int, *, pinned: bool
    ) -> None:
        self._index, self._positions = index, positions
        self._batch_size, self._image_size, self._pinned = batch_size, image_size, pinned
        self._with_dali = dali_or_none() is not None

    def parts(self, io: ThreadPoolExecutor) -> Iterator[Part]:
        """All batches, part by part."""
        reading: deque[tuple[Job, list[Future]]] = deque()
        for start in range(0, len(self._positions), self._batch_size):
            reading.append(self._start(io, self._positions[start : start + self._batch_size]))
            if len(reading) > 1:
                yield from self._parts_of(*reading.popleft())
        while reading:
            yield from self._parts_of(*reading.popleft())

    def _start(self, io: ThreadPoolExecutor, positions_B: np.ndarray) -> tuple[Job, list[Future]]:
        count, side = len(positions_B), self._image_size
        images_B3SS = torch.empty(count, 3, side, side, dtype=torch.uint8, pin_memory=self._pinned)
        job = Job(positions_B, images_B3SS, [None] * count, [None] * count, [0] * count)
        chunks = [range(count)[first : first + READ_CHUNK] for first in range(0, count, READ_CHUNK)]
        return job, [io.submit(self._read, job, chunk) for chunk in chunks]

    def _read(self, job: Job, rows: range) -> None:
        for row in rows:
            try:
                data = self._index.read(int(job.positions_B[row]))
            except ReadError as error:
                job.reasons[row] = str(error)
                continue
            job.encoded[row] = data
            if self._with_dali:
                job.pixels[row] = pixels_for_dali(data)

    @staticmethod
    def _parts_of(job: Job, chunks: list[Future]) -> Iterator[Part]:
        for chunk in chunks:
            chunk.result()
        rows: list[int] = []
        held = 0
        for row, pixels in enumerate(job.pixels):
            if rows and held + pixels > MAX_PART_PIXELS:
                yield Part(job, rows, last=False)
                rows, held = [], 0
            if pixels:
                rows.append(row)
                held += pixels
        yield Part(job, rows, last=True)


@cache
def dali_or_none() -> str | None:
    """DALI's version; None, said once, where it is not installed and PIL decodes in its place."""
    try:
        import nvidia.dali
        import nvidia.nvimgcodec
    except ImportError as error:
        warnings.warn(
            f"images are decoded by PIL, several times slower: DALI cannot be imported ({error})", stacklevel=2
        )
        return None
    return nvidia.dali.__version__
