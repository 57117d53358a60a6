"""Figures over all pairs of two sets, a chunk of rows at a time.

Shapes: N and M samples of two sets, D features.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from rae_fast.progress import Progress

CHUNK = 1024
LONG = 3e8  # pairs that take so long that progress is shown


def row_chunks(x_ND: Tensor, columns: int, label: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of `x_ND`, each to be compared with `columns` others; shows progress where it takes long."""
    progress = Progress(len(x_ND), "images", label, enabled=len(x_ND) * columns > LONG)
    for start in range(0, len(x_ND), CHUNK):
        rows = x_ND[start : start + CHUNK]
        yield start, rows
        progress.advance(len(rows))
    progress.close()


def squared_distances(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """|x - y|^2 for all pairs, [N, M], at least 0."""
    squares = x_ND.square().sum(1)[:, None] + y_MD.square().sum(1)[None]
    return (squares - 2 * (x_ND @ y_MD.T)).clamp_(min=0)
