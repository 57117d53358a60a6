"""Improved precision and recall (Kynkaanniemi et al., 2019) by k-nearest-neighbour balls, in chunks.

Shapes: N and M samples of two sets, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.evaluation.pairwise import row_chunks, squared_distances

NEIGHBOURS = 3


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
    for start, rows in row_chunks(x_ND, len(x_ND), "nearest neighbours"):
        distance = squared_distances(rows, x_ND)
        own = torch.arange(len(rows), device=x_ND.device)
        distance[own, start + own] = torch.inf
        radii.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _share_inside(points_ND: Tensor, centers_MD: Tensor, radii_M: Tensor) -> float:
    inside = 0
    for _, rows in row_chunks(points_ND, len(centers_MD), "manifolds"):
        inside += int((squared_distances(rows, centers_MD) <= radii_M).any(dim=1).sum())
    return inside / len(points_ND)
