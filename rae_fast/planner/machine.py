"""What this machine does, measured in under a minute: decoding, reading, products, the encoder, a training step.

A training step is measured on models with one block of each kind and with several, and grows by the block from there:
so the largest model can be planned on a device that could not hold it.

Shapes: B images of a micro-batch, C, H, W of a latent.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from rae_fast.config import Config
from rae_fast.dit.registry import TARGETS, build_dit, size_presets
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, dit_params
from rae_fast.images.decode import ImagePipeline, default_threads
from rae_fast.images.entries import ImageIndex
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.loader import LatentBatch
from rae_fast.latents.native_reader import aligned_empty
from rae_fast.planner.roofline import from_params, training_flops
from rae_fast.runtime import Ranks
from rae_fast.training.batching import ema_decays
from rae_fast.training.engine import Engine
from rae_fast.training.pairs import PairMaker

DECODE_S, DISK_S = 8.0, 3.0
DISK_BYTES, READ_THREADS = 1 << 28, 16
REPEATS = 3
PRODUCTS = 16
STEP_BUDGET_S = 1.5  # of one forward and backward pass
LARGEST_TRIAL_BATCH, DEEPEST_TRIAL = 64, 8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step on one device: image_s for each image, update_s once for each optimizer step."""

    image_s: float
    update_s: float

    def images_s(self, images: int) -> float:
        """Images a second of steps with so many images on this device."""
        return images / (self.image_s * images + self.update_s)


def measure_decode(index: ImageIndex, config: Config, image_size: int, seconds: float = DECODE_S) -> float:
    """Images a second that this machine decodes and crops, all of its cores at work."""
    positions = np.random.default_rng(0).permutation(len(index))
    # Small batches: the first one is what the rate is counted from.
    batch = max(8, min(64, len(index) // 8))
    pipeline = ImagePipeline(index, positions, image_size, config.data.crop, batch, "cpu", config.data.threads)
    started_s, made, first = 0.0, 0, True
    for found in pipeline:
        if first:
            started_s, first = time.perf_counter(), False
            continue
        made += len(found.valid_B)
        if time.perf_counter() - started_s > seconds:
            break
    if not made:
        raise UserError(f"{index.source} has {len(index)} images", "at least 16, to measure the rate of decoding")
    return made / (time.perf_counter() - started_s)


def measure_disk(folder: Path, row_bytes: int, seconds: float = DISK_S) -> float:
    """Bytes a second of random reads of one latent each, past the page cache where the file system can.

    Args:
        folder: where the store will be; the nearest folder above it that exists is measured.
        row_bytes: of one read.
    """
    while not folder.is_dir():
        folder = folder.parent
    block = max(4096, row_bytes // 4096 * 4096)
    count = max(1, DISK_BYTES // block)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".plan-") as file:
        noise = np.random.default_rng(0).bytes(block)
        for _ in range(count):
            file.write(noise)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _random_reads(_open_past_cache(file.name), block, count, seconds)


def _open_past_cache(name: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # tmpfs and some network file systems have no such reads
        return os.open(name, os.O_RDONLY)


def _random_reads(handle: int, block: int, count: int, seconds: float) -> float:
    until_s = time.perf_counter() + seconds

    def work(seed: int) -> int:
        random, buffer, done = np.random.default_rng(seed), memoryview(aligned_empty((block,), np.uint8)), 0
        while time.perf_counter() < until_s:
            done += os.preadv(handle, [buffer], int(random.integers(count)) * block)
        return done

    started_s = time.perf_counter()
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            total = sum(pool.map(work, range(READ_THREADS)))
    finally:
        os.close(handle)
    return total / (time.perf_counter() - started_s)


def measure_products(device: torch.device) -> float:
    """FLOP/s of a large matrix product at its fastest: bfloat16 on a GPU, float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(_seconds(lambda: a @ b, device) for _ in range(PRODUCTS))


def measure_encoder(config: Config, geometry: Geometry, device: torch.device) -> float | None:
    """Images a second of the encoder in one view; None where its weights are not on this machine."""
    try:
        encoder = LatentEncoder(config.stage_1.params, config.cache.precision, device)
    except UserError:
        return None
    batch = 64 if device.type == "cuda" else 4
    images = torch.zeros(batch, 3, geometry.image_size, geometry.image_size, dtype=torch.uint8, device=device)
    return batch / median_s(lambda: encoder(images), device)


def measure_step(config: Config, geometry: Geometry, device: torch.device, product_flops: float) -> StepTime:
    """Seconds of the config's training step on this device, from models of one block of each kind and of several."""
    target, params = config.stage_2.target, dit_params(config, geometry)
    numbers = size_presets()[target][1] if target in size_presets() else {}
    kind = size_presets()[target][0] if target in size_presets() else TARGETS[target]
    params = {**numbers, **params}
    depths = _depths(params.get("depth", kind.__init__.__kwdefaults__["depth"]))

    def seconds(trial: list[int]) -> float:
        return training_flops(from_params(kind.__name__, with_depth(trial))) / product_flops

    def with_depth(trial: list[int]) -> dict[str, Any]:
        return {**params, "depth": trial if len(trial) > 1 else trial[0]}

    def trial_of(stack: int, blocks: int) -> list[int]:
        return [blocks if i == stack else 1 for i in range(len(depths))]

    fitting_batch = int(STEP_BUDGET_S / seconds(trial_of(len(depths) - 1, 2)))
    batch = max(1, min(config.training.batch_size or 16, LARGEST_TRIAL_BATCH, fitting_batch))
    # What one block takes is lost in the noise of 28 times the difference of two short models.
    longer = []
    for i, depth in enumerate(depths):
        fitting = (
            t for t in range(min(depth, DEEPEST_TRIAL), 2, -1) if batch * seconds(trial_of(i, t)) < STEP_BUDGET_S
        )
        longer.append(next(fitting, 2))
    times = time_models(
        config,
        geometry,
        device,
        [with_depth(trial_of(0, 1)), *(with_depth(trial_of(i, blocks)) for i, blocks in enumerate(longer))],
        batch,
    )
    base = times[0]
    image_s, update_s = base.image_s, base.update_s
    for depth, blocks, time_s in zip(depths, longer, times[1:], strict=True):
        image_s += (depth - 1) * max(time_s.image_s - base.image_s, 0) / (blocks - 1)
        update_s += (depth - 1) * max(time_s.update_s - base.update_s, 0) / (blocks - 1)
    return StepTime(image_s, update_s)


def _depths(depth: Any) -> list[int]:
    return [int(d) for d in depth] if isinstance(depth, list | tuple) else [int(depth)]


def time_models(
    config: Config, geometry: Geometry, device: torch.device, models: Sequence[dict[str, Any]], batch: int
) -> list[StepTime]:
    """Steps as training makes them, of several models in turn, so that a machine that others use slows all alike."""
    trials = [Trial(config, geometry, device, params, batch) for params in models]
    for _ in range(1 + REPEATS):
        for trial in trials:
            trial.step()
    found = [trial.close() for trial in trials]
    del trials
    gc.collect()
    return found


class Trial:
    """A model that trains on noise: pairs, forward, backward; then clipping, AdamW and averages.

    Args:
        config: objective, optimizer and precision.
        geometry: of the latents.
        device: where it runs.
        params: of the model.
        batch: images of a step.
    """

    def __init__(
        self, config: Config, geometry: Geometry, device: torch.device, params: dict[str, Any], batch: int
    ) -> None:
        model = build_dit(config.stage_2.target, params).train()
        model.activation_checkpointing = config.runtime.activation_checkpointing
        self.device, self.batch = device, batch
        self.engine = Engine(
            model,
            optimizer=config.training.optimizer,
            lr=lambda step: config.training.optimizer.lr,
            ranks=Ranks(),
            device=device,
            runtime=replace(config.runtime, engine="ddp", compile=config.runtime.compile and device.type == "cuda"),
            clip_grad=config.training.clip_grad,
            ema_decays=ema_decays(config.training),
        )
        self.pairs = PairMaker(config, geometry.latent_shape)
        index = torch.arange(batch, device=device)
        latents = torch.randn(batch, *geometry.latent_shape, device=device)
        self.data = LatentBatch(latents, torch.zeros_like(index), index, 0)
        self.drop = torch.ones(batch, device=device)
        self.learning_s: list[float] = []
        self.updating_s: list[float] = []

    def step(self) -> None:
        """One step, timed."""
        self.learning_s.append(_seconds(self._learn, self.device))
        self.updating_s.append(_seconds(self.engine.step, self.device))

    def _learn(self) -> None:
        labels_B = self.data.labels_B
        loss, _ = self.pairs.loss(lambda x, t: self.engine(x, t, labels_B, labeldrop_u=self.drop), self.data, 0)
        self.engine.backward(loss.mean())

    def close(self) -> StepTime:
        """Medians of all steps but the first."""
        self.engine.close()
        return StepTime(statistics.median(self.learning_s[1:]) / self.batch, statistics.median(self.updating_s[1:]))


def median_s(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of a run, after one that is not counted."""
    _seconds(run, device)
    return statistics.median(_seconds(run, device) for _ in range(repeats))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


def device_memory(device: torch.device) -> int:
    """Bytes of the device; of this machine where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def cores() -> int:
    """Cores of this machine that a process may use."""
    return default_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
