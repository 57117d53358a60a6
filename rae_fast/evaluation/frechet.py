"""Frechet distance between Gaussians fitted to features, and their moments from a stream.

Shapes: N samples, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks


class StreamingMoments:
    """Count, mean and scatter of features, float64 on the CPU; mergeable over ranks.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    def update(self, features_ND: Tensor | np.ndarray) -> None:
        """Take in features of any floating dtype.

        Raises:
            UserError: another number of features, or values that are not finite.
        """
        features = torch.as_tensor(features_ND).detach().double().cpu().numpy()
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise UserError(f"features of shape {features.shape}", f"[N, {len(self._mean)}]")
        if not np.isfinite(features).all():
            raise UserError("features that are not finite", "finite features", "run the extractor in float32")
        mean = features.mean(0) if len(features) else self._mean
        centered = features - mean
        self._combine(len(features), mean, centered.T @ centered)

    def merge(self, other: StreamingMoments) -> None:
        """Take in what `other` has seen."""
        self._combine(other.count, other._mean, other._scatter)

    def over(self, ranks: Ranks) -> StreamingMoments:
        """The moments of what all ranks have seen, on every rank; collective."""
        if ranks.world == 1:
            return self
        states: list[Any] = [None] * ranks.world
        dist.all_gather_object(states, self.state())
        found = StreamingMoments(len(self._mean))
        for state in states:
            found.merge(self.from_state(state))
        return found

    def _combine(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """Chan's update of count, mean and scatter."""
        total = self.count + count
        if not count:
            return
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + np.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean [D], covariance [D, D] divided by N - 1), float64.

        Raises:
            UserError: fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"statistics of {self.count} images", "two or more")
        return self._mean.copy(), self._scatter / (self.count - 1)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for `np.savez`; `from_state` reads them back."""
        return {"count": np.array(self.count, np.int64), "mean": self._mean, "scatter": self._scatter}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> StreamingMoments:
        """The moments that `state` described."""
        found = cls(len(state["mean"]))
        found.count = int(state["count"])
        found._mean, found._scatter = np.array(state["mean"]), np.array(state["scatter"])
        return found


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), at least 0 (Dowson & Landau, 1982).

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric and has
    the eigenvalues of S1 S2; unlike a root of the product it needs no offset when the covariances are singular.

    Raises:
        UserError: different numbers of features.
    """
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1), len(mu1)):
        raise UserError(
            f"statistics of {mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape} features",
            "the same number of features",
            "use the same feature extractor for both",
        )
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, np.float64) for value in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh((sigma1 + sigma1.T) / 2)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ sigma2 @ root
    trace_of_root = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)
