"""From images to un-normalized latents, unit by unit, in batches whose make-up depends on nothing but the store.

A unit is the rows of one shard. Its rows are encoded in fixed batches, whatever the decoder's batches were and
whichever rank does it: floating-point results depend on what shares a batch, and a resumed build must give the same
bytes.

Shapes: B images of an encode batch, S side of the crop, C, H, W of a latent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.config import Stage1Params
from rae_fast.encoders import FrozenEncoder, build_encoder
from rae_fast.latents.layout import PIXELS
from rae_fast.latents.sources import ImageSource
from rae_fast.runtime import DTYPES, set_precision

CPU_ENCODE_BATCH = 32
LARGEST_ENCODE_BATCH = 512
NOT_FINITE = "the encoder gave values that are not finite"


@dataclass(frozen=True)
class Unit:
    """Rows of one shard that are to be encoded, ascending; all of them, or a subset for statistics."""

    shard: int
    rows: np.ndarray


@dataclass
class RawBatch:
    """One encode batch.

    Attributes:
        unit: whose rows these are.
        first: position within the unit of the first row.
        last_of_unit: whether the unit ends here.
        planes: per view un-normalized latents [B, C, H, W], zero where not valid; `pixels` uint8 [B, 3, S, S].
        valid_B: bool, on the CPU.
        failures: (row, path, reason) of images that could not be decoded.
    """

    unit: Unit
    first: int
    last_of_unit: bool
    planes: dict[str, Tensor]
    valid_B: Tensor
    failures: list[tuple[int, str, str]]

    @property
    def count(self) -> int:
        """Images in the batch."""
        return len(self.valid_B)


@dataclass
class StageTimes:
    """Seconds that each stage kept the others waiting."""

    decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0

    def by_stage(self) -> dict[str, float]:
        """The seconds by the stage's name."""
        return {"decode": self.decode_s, "encode": self.encode_s, "write": self.write_s}

    def limits(self) -> str:
        """The stage that limits, and its share of the time."""
        waits_s = self.by_stage()
        total_s = sum(waits_s.values())
        if total_s <= 0:
            return "-"
        worst = max(waits_s, key=lambda stage: waits_s[stage])
        return f"{worst} {waits_s[worst] / total_s:.0%}"


class LatentEncoder:
    """The frozen encoder with its precision: uint8 images to un-normalized latents.

    Args:
        params: stage 1 of the config.
        precision: fp32, tf32, bf16 or fp16; the lower ones through autocast.
        device: where it runs.

    Raises:
        UserError: the encoder is unknown or its weights are missing.
    """

    def __init__(self, params: Stage1Params, precision: str, device: torch.device) -> None:
        self.encoder: FrozenEncoder = build_encoder(
            params.encoder_cls,
            input_size=params.encoder_input_size,
            params=params.encoder_params,
            config_path=params.encoder_config_path,
        )
        self.encoder.to(device).eval().requires_grad_(False)
        self.precision, self.device = precision, device
        # Beside the encoder, shapes depend on the data (which images are valid): XLA would compile one graph for each.
        self.data_device = torch.device("cpu") if device.type == "xla" else device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return self.encoder.hidden_size, self.encoder.grid, self.encoder.grid

    def identity(self) -> dict[str, Any]:
        """What the latents depend on: name, revision, weights, layers, norm, input size, resize rule."""
        return self.encoder.identity()

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor, *, flip: bool = False) -> Tensor:
        """uint8 [B, 3, S, S] to un-normalized latents [B, C, H, W] on the encoder's device; `flip` mirrors first."""
        x_B3SS = images_B3SS.to(self.device, non_blocking=True).float().div_(255)
        with self.autocast():
            tokens_BNC = self.encoder(x_B3SS.flip(-1) if flip else x_B3SS)
        return tokens_BNC.transpose(1, 2).reshape(len(x_B3SS), *self.latent_shape).contiguous()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the encoder runs at its precision."""
        dtype = DTYPES[self.precision]
        if self.precision == "tf32" or dtype == torch.float32:
            set_precision(self.precision)
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    def largest_batch(self, image_size: int, limit: int) -> int:
        """The largest power of two of images that fits in memory, by trial; `limit` at most, fixed on a CPU."""
        if self.device.type != "cuda":
            return min(CPU_ENCODE_BATCH, limit)
        batch = min(LARGEST_ENCODE_BATCH, 1 << (limit.bit_length() - 1))
        while batch > 1:
            try:
                # Twice the batch: decoding and the other view want their share of the memory.
                self(torch.zeros(2 * batch, 3, image_size, image_size, dtype=torch.uint8, device=self.device))
            except torch.cuda.OutOfMemoryError:
                batch //= 2
            else:
                break
            finally:
                torch.cuda.empty_cache()
        return batch


@dataclass
class EncodeJob:
    """Everything that encoding a unit depends on.

    Attributes:
        encoder: the frozen encoder.
        source: the images.
        position_N: int64 [N], where in the source each row's image is.
        views: which views to encode.
        pixels: also hand over the crops.
        batch_size: images of an encode batch.
    """

    encoder: LatentEncoder
    source: ImageSource
    position_N: np.ndarray
    views: Sequence[str]
    pixels: bool
    batch_size: int
    times: StageTimes = field(default_factory=StageTimes)
    stop: Callable[[], None] = lambda: None


def encode_units(job: EncodeJob, units: Sequence[Unit]) -> Iterator[RawBatch]:
    """Encode units in turn, one pipeline over all of their images.

    Raises:
        UserError: the decoder cannot run on this machine.
    """
    if not units:
        return
    images = _ImageStream(job, np.concatenate([unit.rows for unit in units]))
    try:
        for unit in units:
            for first in range(0, len(unit.rows), job.batch_size):
                job.stop()
                count = min(job.batch_size, len(unit.rows) - first)
                yield _encode(job, unit, first, *images.take(count))
    finally:
        images.close()


def _encode(
    job: EncodeJob,
    unit: Unit,
    first: int,
    images_B3SS: Tensor,
    valid_B: Tensor,
    failed: Mapping[int, tuple[str, str]],
) -> RawBatch:
    started_s = time.monotonic()
    rows = unit.rows[first : first + len(valid_B)]
    images_B3SS[~valid_B.to(images_B3SS.device)] = 0
    planes = {view: job.encoder(images_B3SS, flip=view == "hflip").to(job.encoder.data_device) for view in job.views}
    valid_B = valid_B.clone()
    failures = [(row, *failed[i]) for i, row in enumerate(rows.tolist()) if i in failed]
    finite_B = torch.stack([z.isfinite().flatten(1).all(1) for z in planes.values()]).all(0).cpu()
    for i in torch.nonzero(~finite_B & valid_B).flatten().tolist():
        failures.append((int(rows[i]), job.source.paths[int(job.position_N[rows[i]])], NOT_FINITE))
        valid_B[i] = False
    for z in planes.values():
        z[~valid_B.to(z.device)] = 0
    if job.pixels:
        planes[PIXELS] = images_B3SS
    job.times.encode_s += time.monotonic() - started_s
    return RawBatch(unit, first, first + len(rows) == len(unit.rows), planes, valid_B, sorted(failures))


class _ImageStream:
    """Decoded images in row order, cut to any size: the decoder's batches need not be the encoder's."""

    def __init__(self, job: EncodeJob, rows: np.ndarray) -> None:
        self._times = job.times
        self._batches = job.source.decode(job.position_N[rows], job.encoder.data_device)
        self._images: list[Tensor] = []
        self._valid: list[Tensor] = []
        self._failed: dict[int, tuple[str, str]] = {}  # place in the stream -> (path, reason)
        self._decoded = self._taken = 0

    def take(self, count: int) -> tuple[Tensor, Tensor, dict[int, tuple[str, str]]]:
        """The next `count` images uint8 [B, 3, S, S], whether each is valid, and (path, reason) of the others."""
        while self._decoded - self._taken < count:
            started_s = time.monotonic()
            batch = next(self._batches)
            self._times.decode_s += time.monotonic() - started_s
            place_of = {int(position): self._decoded + i for i, position in enumerate(batch.positions_B.tolist())}
            for position, path, reason in batch.failures:
                self._failed[place_of[int(position)]] = (str(path), str(reason))
            self._images.append(batch.images_B3SS)
            self._valid.append(batch.valid_B)
            self._decoded += len(batch.valid_B)
        images, valid = _join(self._images), _join(self._valid)
        self._images, self._valid = [images[count:]], [valid[count:]]
        failed = {place - self._taken: self._failed.pop(place) for place in _between(self._failed, self._taken, count)}
        self._taken += count
        return images[:count].clone(), valid[:count].cpu(), failed

    def close(self) -> None:
        """Stop the decoder's threads."""
        if isinstance(self._batches, Generator):
            self._batches.close()


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _between(places: Iterable[int], first: int, count: int) -> list[int]:
    return [place for place in sorted(places) if first <= place < first + count]
