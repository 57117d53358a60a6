"""Latent statistics against exact ones, and the reference's cross-rank merge (golden README, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_fast.latents.stats import LatentStatistics

GATE = 2e-6


@pytest.fixture
def arrays(golden_file: Callable[[str], Path]) -> np.lib.npyio.NpzFile:
    return np.load(golden_file("stats/latent_stats.npz"))


def batches(arrays: np.lib.npyio.NpzFile) -> list[torch.Tensor]:
    names = sorted((n for n in arrays.files if n.startswith("batch")), key=lambda n: int(n.removeprefix("batch")))
    return [torch.from_numpy(arrays[name]) for name in names]


def test_statistics_are_exact_where_the_reference_s_moving_average_is_not(arrays: np.lib.npyio.NpzFile) -> None:
    statistics = LatentStatistics(arrays["exact/mean"].shape)
    for batch in batches(arrays):
        statistics.update(batch)
    mean, var = statistics.finish()
    np.testing.assert_allclose(mean, arrays["exact/mean"], rtol=GATE, atol=1e-7)
    np.testing.assert_allclose(var, arrays["exact/var_population"], rtol=GATE)
    assert np.abs(arrays["running_var"] / arrays["exact/var_population"] - 1).max() > 0.01


def test_merge_of_equal_ranks_is_the_reference_s(arrays: np.lib.npyio.NpzFile) -> None:
    """It merges means and variances of ranks by the law of total variance, with equal weights."""
    total = LatentStatistics(arrays["ranks/global_mean"].shape)
    count = 1  # any, as it is the same on all ranks
    for mean, var in zip(arrays["ranks/mean"], arrays["ranks/var"], strict=True):
        state = {"count": np.array(count), "mean": mean.astype(np.float64), "m2": var.astype(np.float64) * count}
        total.merge(LatentStatistics.from_state(state))
    mean, var = total.finish()
    np.testing.assert_allclose(mean, arrays["ranks/global_mean"], rtol=GATE, atol=1e-7)
    np.testing.assert_allclose(var, arrays["ranks/global_var"], rtol=GATE)
