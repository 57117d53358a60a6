"""Mean and variance of latents per position, exact and reproducible to the last bit.

Samples are gathered in blocks of 16 counted from the first one; a block's moments are pairwise sums of elementwise
float64 operations, and blocks are merged in order (Chan, Golub and LeVeque, 1979). So the result depends on the order
of the samples alone, neither on the size of the batches that brought them nor on the device.

Shapes: B samples, C channels, H and W of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.latents.layout import single_chunk_key
from rae_fast.latents.storage import Storage
from rae_fast.provenance import atomic_write
from rae_fast.weights import read_statistics

BLOCK = 16
MEAN, VAR = (single_chunk_key(f"stats/{name}", 3) for name in ("mean", "var"))


class LatentStatistics:
    """Count, mean and sum of squared deviations (M2) of a stream of samples, float64.

    Args:
        shape: (C, H, W) of a sample.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = tuple(shape)
        self._count = 0
        self._mean = torch.zeros(self.shape, dtype=torch.float64)
        self._m2 = torch.zeros(self.shape, dtype=torch.float64)
        self._pending: list[Tensor] = []  # samples of the block in progress

    @property
    def count(self) -> int:
        """Samples seen."""
        return self._count + len(self._pending)

    @torch.no_grad()
    def update(self, z_BCHW: Tensor) -> None:
        """Take in samples of any floating dtype; the moments live on their device.

        Raises:
            UserError: another shape than that of the constructor.
        """
        if tuple(z_BCHW.shape[1:]) != self.shape:
            raise UserError(f"latents of shape {tuple(z_BCHW.shape[1:])}", f"{self.shape}, as the first ones")
        start = 0
        while start < len(z_BCHW):
            end = min(len(z_BCHW), start + BLOCK - len(self._pending))
            # Copied: the caller may overwrite its buffer with the next batch.
            self._pending += z_BCHW[start:end].detach().to(torch.float64, copy=True).unbind()
            start = end
            if len(self._pending) == BLOCK:
                self._close_block()

    def merge(self, other: LatentStatistics) -> None:
        """Take in the samples that `other` has seen, after our own; `other` stays as it is."""
        count, mean, m2 = other._moments()
        self._close_block()
        self._combine(count, mean, m2)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(mean, variance) float32 [C, H, W] on the CPU; the variance divides by the count.

        Raises:
            UserError: no sample was seen, or one was not finite.
        """
        count, mean, m2 = self._moments()
        if not count:
            raise UserError("statistics of no latents", "at least one valid image", "check the data source")
        mean, var = mean.float().cpu(), (m2 / count).float().cpu()
        if not (mean.isfinite().all() and var.isfinite().all()):
            raise UserError(
                f"latent statistics over {count} samples are not finite",
                "finite latents",
                "encode in bf16 or fp32 (cache.precision) and check the encoder's weights",
            )
        return mean, var

    def state(self) -> dict[str, np.ndarray]:
        """Count, mean and M2 as arrays for `np.savez`; `from_state` reads them back bit for bit."""
        count, mean, m2 = self._moments()
        return {"count": np.array(count, np.int64), "mean": mean.cpu().numpy(), "m2": m2.cpu().numpy()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> LatentStatistics:
        """The statistics that `state` described."""
        found = cls(state["mean"].shape)
        found._count = int(state["count"])
        found._mean, found._m2 = (torch.from_numpy(np.array(state[key], np.float64)) for key in ("mean", "m2"))
        return found

    def _moments(self) -> tuple[int, Tensor, Tensor]:
        """Moments with the open block included, which stays open."""
        whole = LatentStatistics(self.shape)
        whole._count, whole._mean, whole._m2 = self._count, self._mean, self._m2
        whole._pending = list(self._pending)
        whole._close_block()
        return whole._count, whole._mean, whole._m2

    def _close_block(self) -> None:
        """Merge the samples of the open block."""
        if not self._pending:
            return
        count = len(self._pending)
        mean = _pairwise_sum(self._pending) / count
        m2 = _pairwise_sum([(sample - mean).square() for sample in self._pending])
        self._pending = []
        self._combine(count, mean, m2)

    def _combine(self, count: int, mean: Tensor, m2: Tensor) -> None:
        """Chan's update: n = a + b, mean += delta b / n, M2 += M2_b + delta^2 a b / n."""
        total = self._count + count
        if not total:
            return
        delta = mean - self._mean.to(mean.device)
        self._m2 = self._m2.to(mean.device) + (m2 + delta.square() * (self._count * count / total))
        self._mean = self._mean.to(mean.device) + delta * (count / total)
        self._count = total


def _pairwise_sum(values: list[Tensor]) -> Tensor:
    """Sum in a fixed tree of additions, which no device or thread count can reorder."""
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(values) - len(values) % 2 :]
    return values[0]


def save_statistics(path: str | Path, mean: Tensor | None, var: Tensor | None) -> None:
    """Write `stat.pt` as the reference reads it: {"mean", "var"}, float32 [C, H, W] or None; atomically."""
    content = {"mean": mean, "var": var}
    kept = {
        name: value if value is None else value.detach().cpu().float().contiguous() for name, value in content.items()
    }
    with atomic_write(path) as file:
        torch.save(kept, file)


def load_statistics(path: str, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance float32 [C, H, W] of a `stat.pt`; either may be missing in it (0 and 1 then).

    Raises:
        UserError: see `read_statistics`.
    """
    mean, var = read_statistics(path, latent_shape)
    filled = (torch.tensor(0.0) if mean is None else mean, torch.tensor(1.0) if var is None else var)
    return filled[0].float().broadcast_to(latent_shape), filled[1].float().broadcast_to(latent_shape)


def write_statistics(storage: Storage, mean: Tensor, var: Tensor) -> None:
    """Put mean and variance in place; the mean comes last and says that both are there."""
    for key, value in ((VAR, var), (MEAN, mean)):
        storage.write(key, value.float().contiguous().numpy().astype("<f4").tobytes())
