"""Training as the public reference does it, written as fast as that design allows: what end_to_end.py compares with.

Each step: PIL decode and ADM crop in DataLoader workers, random flip, the frozen encoder in float32, normalization,
flow matching, DDP, clipping, fused AdamW, an EMA loop over parameters, and `.item()` of the loss. Kinder than the
original: its workers hand over uint8 and go on to the next epoch without a pause, its batches are pinned and copied
asynchronously, and its models are ours, which cost no more than its own.

Shapes: B images, S side of the crop, C, H, W of a latent.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.datasets import ImageFolder

from rae_fast.config import Config
from rae_fast.dit.registry import build_dit
from rae_fast.geometry import Geometry, dit_params
from rae_fast.images.crop import center_crop_pil
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.stats import load_statistics
from rae_fast.runtime import Ranks, set_precision
from rae_fast.training.deepspeed_setup import join_single_process_group
from rae_fast.training.engine import compile_blocks, wrap_ddp
from rae_fast.transport.objective import Transport


class FlippedCrop:
    """The reference's transform: centre crop by PIL, flipped half of the time; uint8 [3, S, S]."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Tensor:
        crop_HW3 = np.array(center_crop_pil(image, self.size))
        crop_3HW = torch.from_numpy(crop_HW3).permute(2, 0, 1).contiguous()
        return crop_3HW.flip(-1) if torch.rand(()) < 0.5 else crop_3HW


class AllEpochs(Sampler[int]):
    """One epoch's order after the other, each by the reference's DistributedSampler, without end."""

    def __init__(self, dataset: Dataset) -> None:
        self._sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, drop_last=True)

    def __iter__(self) -> Iterator[int]:
        for epoch in itertools.count():
            self._sampler.set_epoch(epoch)
            yield from self._sampler


class ReferenceTrainer:
    """One rank of the reference's training.

    Args:
        config: model, data, statistics and optimizer.
        geometry: sizes.
        device: where it trains.
        workers: DataLoader processes.
        precision: of the model: fp32, tf32 or bf16; the encoder runs in float32, or TF32 unless the model is fp32.
        compiled: compile the model's blocks, as the README advises for the whole.
    """

    def __init__(
        self, config: Config, geometry: Geometry, device: torch.device, workers: int, precision: str, compiled: bool
    ) -> None:
        torch.manual_seed(config.training.global_seed)
        self.device, self.training = device, config.training
        self.encoder = LatentEncoder(config.stage_1.params, "fp32" if precision == "fp32" else "tf32", device)
        mean, var = load_statistics(str(config.cache.statistics), geometry.latent_shape)
        self.mean, self.std = mean.to(device), (var + config.stage_1.params.eps).sqrt().to(device)
        self.transport = Transport.from_config(config, geometry.latent_shape)
        self.model = build_dit(config.stage_2.target, dit_params(config, geometry)).to(device).train()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        if compiled:
            compile_blocks(self.model)
        set_precision(precision)
        self.autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if precision == "bf16" else nullcontext
        join_single_process_group(Ranks(), device)
        self.ddp: nn.Module = wrap_ddp(self.model, device)
        settings = config.training.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=tuple(settings.betas), weight_decay=0, fused=True
        )
        dataset = ImageFolder(str(config.data.source), transform=FlippedCrop(geometry.image_size))
        self.steps_per_epoch = len(dataset) // config.training.global_batch_size
        self._loader = DataLoader(
            dataset,
            batch_size=config.training.global_batch_size,
            sampler=AllEpochs(dataset),
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        self.restart_loader()

    def restart_loader(self) -> None:
        """New workers, which have decoded nothing yet."""
        self._batches = iter(self._loader)

    def train(self, steps: int) -> int:
        """So many steps; returns the images that they took."""
        for _ in range(steps):
            self.step(*next(self._batches))
        return steps * self.training.global_batch_size

    def step(self, images_B3SS: Tensor, labels_B: Tensor) -> float:
        """One optimizer step; returns the loss."""
        with torch.no_grad():
            z_BCHW = self.encode(images_B3SS)
        return self.learn(z_BCHW, labels_B.to(self.device, non_blocking=True))

    def encode(self, images_B3SS: Tensor) -> Tensor:
        """Normalized latents [B, C, H, W]."""
        return (self.encoder(images_B3SS.to(self.device, non_blocking=True)).float() - self.mean) / self.std

    def learn(self, z_BCHW: Tensor, labels_B: Tensor) -> float:
        """Forward, backward, clipping, AdamW, EMA."""
        t_B = self.transport.sample_time(torch.rand(len(z_BCHW), device=self.device))

        def predict(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            with self.autocast():
                return self.ddp(x_BCHW, t_B, labels_B)

        loss = self.transport.loss(predict, z_BCHW, t_B, torch.randn_like(z_BCHW)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_grad or float("inf"))
        self.optimizer.step()
        self.update_average()
        return loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        """Parameter by parameter."""
        decay = float(self.training.ema_decay)
        for average, online in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.mul_(decay).add_(online, alpha=1 - decay)

    def split_ms(self, batches: int) -> dict[str, float]:
        """Milliseconds an image of each part alone: decoding in all workers, encoding, training; ends the workers."""
        size, device = self.training.global_batch_size, self.device
        ready = self._loader.num_workers * (self._loader.prefetch_factor or 0)
        for _ in range(ready):
            next(self._batches)
        started_s = time.perf_counter()
        for _ in range(batches):
            images_B3SS, labels_B = next(self._batches)
        decode_s = (time.perf_counter() - started_s) / batches
        self._batches = iter(())
        z_BCHW = self.encode(images_B3SS)
        labels_B = labels_B.to(device)
        encode_s = _mean_s(lambda: self.encode(images_B3SS), batches, device)
        learn_s = _mean_s(lambda: self.learn(z_BCHW, labels_B), batches, device)
        parts = {"decode": decode_s, "encode": encode_s, "train": learn_s}
        return {name: round(1e3 * seconds / size, 4) for name, seconds in parts.items()}


def _mean_s(run: object, times: int, device: torch.device) -> float:
    assert callable(run)
    run()
    started_s = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started_s) / times
