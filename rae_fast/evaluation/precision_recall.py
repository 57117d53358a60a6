"""Improved precision and recall (Kynkaanniemi et al., 2019) by k-nearest-neighbour balls, in chunks.

Shapes: N and M samples of two sets, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError

NEIGHBOURS = 3
CHUNK = 1024


def precision_recall(
    samples_ND: np.ndarray,
    reference_MD: np.ndarray,
    *,
    neighbours: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """(precision, recall): shares of samples in the reference's manifold, and of references in the samples'.

    A manifold is the union of balls around a set's members, each reaching to its k-th nearest other member, border
    included. Distances are Euclidean, in float64, so that no chunk size shows in the result.

    Args:
        samples_ND: features of generated images.
        reference_MD: features of real images.
        neighbours: k.
        device: where distances are computed.

    Raises:
        UserError: a set has no more than k members, or the numbers of features differ.
    """
    for name, features in (("samples", samples_ND), ("references", reference_MD)):
        if len(features) <= neighbours:
            raise UserError(f"precision and recall of {len(features)} {name}", f"more than {neighbours}")
    if samples_ND.shape[1] != reference_MD.shape[1]:
        raise UserError(f"features of {samples_ND.shape[1]} and {reference_MD.shape[1]} values", "one extractor")
    samples, reference = (torch.as_tensor(x).to(device, torch.float64) for x in (samples_ND, reference_MD))
    precision = _share_inside(samples, reference, _radii(reference, neighbours))
    return precision, _share_inside(reference, samples, _radii(samples, neighbours))


def _radii(x_ND: Tensor, neighbours: int) -> Tensor:
    """Squared distance to the k-th nearest other member, [N]."""
    radii = []
    for start in range(0, len(x_ND), CHUNK):
        rows = torch.arange(start, min(start + CHUNK, len(x_ND)), device=x_ND.device)
        distance = squared_distances(x_ND[rows], x_ND)
        distance[torch.arange(len(rows), device=x_ND.device), rows] = torch.inf
        radii.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _share_inside(points_ND: Tensor, centers_MD: Tensor, radii_M: Tensor) -> float:
    inside = 0
    for chunk in points_ND.split(CHUNK):
        inside += int((squared_distances(chunk, centers_MD) <= radii_M).any(dim=1).sum())
    return inside / len(points_ND)


def squared_distances(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """|x - y|^2 for all pairs, [N, M], at least 0."""
    squares = x_ND.square().sum(1)[:, None] + y_MD.square().sum(1)[None]
    return (squares - 2 * (x_ND @ y_MD.T)).clamp_(min=0)
