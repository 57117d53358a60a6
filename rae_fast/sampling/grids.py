"""Grids that show what a model has learnt: one noise in many classes, and ways from one sample to another.

Shapes: R rows, K columns, n = R K images, [C, H, W] a latent, D width of the label embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from rae_fast.autoencoder.rae import RAE
from rae_fast.errors import UserError
from rae_fast.sampling.sampler import LatentSampler, decode_images, draw_images, pieces


def class_sweep(sampler: LatentSampler, rae: RAE, classes: Sequence[int], columns: int, seed: int) -> np.ndarray:
    """One row for each class, one column for each noise: images uint8 [R K, S, S, 3], row by row.

    Column k is sample k of the seed, in every row.
    """
    labels = np.repeat(np.asarray(classes, np.int64), columns)
    index = np.tile(np.arange(columns), len(classes))
    return draw_images(sampler, rae, labels, index, seed)


def interpolation(
    sampler: LatentSampler,
    rae: RAE,
    ends: tuple[int, int],
    columns: int,
    rows: int,
    seed: int,
    *,
    fixed_noise: bool = False,
) -> np.ndarray:
    """Rows that lead from one sample to another: images uint8 [R K, S, S, 3], row by row.

    Row r goes from sample 2r of class `ends[0]` to sample 2r + 1 of class `ends[1]`: noise along the great circle,
    label embedding along the straight line. The ends are the samples that these numbers give elsewhere.

    Args:
        sampler: draws.
        rae: decodes.
        ends: two classes, or twice the same.
        columns: images of a row, 2 or more.
        rows: number of rows.
        seed: of the noise.
        fixed_noise: noise 2r throughout a row, so that only the class changes.

    Raises:
        UserError: fewer than two columns, or no row.
    """
    if columns < 2 or rows < 1:
        raise UserError(f"interpolation of {columns} columns in {rows} rows", "2 or more columns in 1 or more rows")
    weights_K = torch.linspace(0, 1, columns, device=sampler.device)
    start_R = 2 * torch.arange(rows, device=sampler.device)
    end_R = start_R if fixed_noise else start_R + 1

    def noise(step: int) -> Tensor:
        z0, z1 = (sampler.noise(index_R, seed, step) for index_R in (start_R, end_R))
        return torch.stack([great_circle(z0, z1, w) for w in weights_K], dim=1).flatten(0, 1)

    with label_line(sampler, ends, weights_K) as labels_K:
        z_nCHW = _integrate(sampler, noise, labels_K.repeat(rows))
    return decode_images(rae, z_nCHW, sampler.rows)


def great_circle(z0_BCHW: Tensor, z1_BCHW: Tensor, weight: Tensor | float) -> Tensor:
    """sin((1 - w) a) / sin a z0 + sin(w a) / sin a z1 with a the angle between them (Shoemake, 1985); z0 where a = 0.

    A straight line between two normal noises passes through points of too small a norm.
    """
    flat0, flat1 = z0_BCHW.flatten(1), z1_BCHW.flatten(1)
    cosine = (flat0 * flat1).sum(1) / (flat0.norm(dim=1) * flat1.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1)).reshape(-1, 1, 1, 1)
    on_circle = (torch.sin((1 - weight) * angle) * z0_BCHW + torch.sin(weight * angle) * z1_BCHW) / torch.sin(angle)
    same = (flat0 == flat1).all(1).reshape(-1, 1, 1, 1)
    return torch.where(same, z0_BCHW, on_circle)


@contextmanager
def label_line(sampler: LatentSampler, ends: tuple[int, int], weights_K: Tensor) -> Iterator[Tensor]:
    """While it lasts, the models know K more labels, on the line between two embeddings; yields them, int64 [K].

    They come behind the null label, which keeps its number.
    """
    kept: list[tuple[nn.Embedding, nn.Parameter]] = []
    first = 0
    try:
        for model in filter(None, (sampler.model, sampler.guide)):
            table: nn.Embedding = model.y_embedder.embedding_table
            kept.append((table, table.weight))
            start_D, end_D = table.weight[ends[0]], table.weight[ends[1]]
            line_KD = torch.lerp(start_D[None], end_D[None], weights_K[:, None].to(start_D.dtype))
            first = len(table.weight)
            table.weight = nn.Parameter(torch.cat([table.weight, line_KD]), requires_grad=False)
        yield first + torch.arange(len(weights_K), device=weights_K.device)
    finally:
        for table, weight in kept:
            table.weight = weight


def _integrate(sampler: LatentSampler, noise: Callable[[int], Tensor], labels_n: Tensor) -> Tensor:
    """Latents [n, C, H, W] from noises given all at once, in pieces as `draw_latents` makes them."""
    start_nCHW, drawn = noise(0), []
    for piece, padded in pieces(len(labels_n), sampler.rows_together):
        chosen = torch.as_tensor(padded, device=labels_n.device)
        z = sampler.integrate(start_nCHW[chosen], labels_n[chosen], lambda step, chosen=chosen: noise(step + 1)[chosen])
        drawn.append(z[: len(piece)])
    return torch.cat(drawn)
