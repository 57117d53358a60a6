"""Maximum mean discrepancy of two sets of features.

Shapes: N and M samples of two sets, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.evaluation.pairwise import row_chunks


def squared_mmd(samples_ND: np.ndarray, reference_MD: np.ndarray, *, device: torch.device | str = "cpu") -> float:
    """Unbiased MMD^2 with the polynomial kernel k(x, y) = (x.y / D + 1)^3 over all pairs (Binkowski et al., 2018).

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j), in float64. This is KID's
    estimator on the whole sets instead of a mean over subsets; being unbiased, it may be below zero.

    Args:
        samples_ND: features of generated images.
        reference_MD: features of real images.
        device: where kernels are computed.

    Raises:
        UserError: a set has fewer than two members, or the numbers of features differ.
    """
    if min(len(samples_ND), len(reference_MD)) < 2:
        raise UserError(f"MMD of {len(samples_ND)} and {len(reference_MD)} images", "two or more of each")
    if samples_ND.shape[1] != reference_MD.shape[1]:
        raise UserError(f"features of {samples_ND.shape[1]} and {reference_MD.shape[1]} values", "one extractor")
    x, y = (torch.as_tensor(features).to(device, torch.float64) for features in (samples_ND, reference_MD))
    return _mean_off_diagonal(x) + _mean_off_diagonal(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _mean_off_diagonal(x_ND: Tensor) -> float:
    diagonal = float(_kernel(x_ND.square().sum(1), x_ND.shape[1]).sum())
    return (_kernel_sum(x_ND, x_ND) - diagonal) / (len(x_ND) * (len(x_ND) - 1))


def _kernel_sum(x_ND: Tensor, y_MD: Tensor) -> float:
    chunks = row_chunks(x_ND, len(y_MD), "MMD")
    return sum(float(_kernel(rows @ y_MD.T, x_ND.shape[1]).sum()) for _, rows in chunks)


def _kernel(product: Tensor, dim: int) -> Tensor:
    return (product / dim + 1) ** 3
