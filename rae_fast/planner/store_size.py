"""How many bytes a latent store takes, before there is one.

Shapes: N images, C, H, W of a latent, S side of the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from rae_fast.latents.layout import Plane, index_bytes, planes_of, shard_count

# zstd on int8 steps of 0.1 of normalized latents: 133,194 bytes for 196,608 values (research/store.md, simulated
# latents of unit variance). The other codecs' sizes are exact.
COMPACT_BYTES_A_VALUE = 0.6775
PATH_BYTES = 28  # of an ImageNet image: n01440764/n01440764_10026.JPEG


@dataclass(frozen=True)
class StoreSize:
    """Bytes of a store.

    Attributes:
        shards: latents, scales and pixels.
        small: labels, paths, checksums and statistics, with their backup; metadata in JSON comes on top (some 70 kB).
        row: of one image in one view, as the loader reads it.
        exact: whether no compression is involved.
    """

    shards: int
    small: int
    row: float
    exact: bool

    @property
    def total(self) -> int:
        """All of it."""
        return self.shards + self.small


def store_size(
    latent_shape: Sequence[int],
    images: int,
    *,
    codec: str = "lossless",
    views: Sequence[str] = ("original", "hflip"),
    shard_size: int = 2048,
    pixels: int | None = None,
    path_bytes: float = PATH_BYTES,
) -> StoreSize:
    """Bytes of a store of `images` latents [C, H, W].

    Args:
        latent_shape: [C, H, W].
        images: N.
        codec: lossless, balanced or compact.
        views: original, hflip.
        shard_size: images of a shard.
        pixels: side of the stored crops, or None.
        path_bytes: mean length of a path.
    """
    planes = planes_of(latent_shape, views, codec, pixels)
    shards = sum(_plane_bytes(plane, images, shard_size) for plane in planes.values())
    # labels int32, valid, offsets int64, and a checksum for each plane
    small = images * (4 + 1 + 8 + 4 * len(planes)) + 8 + round(images * path_bytes) + 8 * prod(latent_shape)
    view = planes[views[0]]
    return StoreSize(shards, 2 * small, _row_bytes(view) + view.scale_bytes, not view.compressed)


def _row_bytes(plane: Plane) -> float:
    return prod(plane.row_shape) * COMPACT_BYTES_A_VALUE if plane.compressed else plane.row_bytes


def _plane_bytes(plane: Plane, images: int, shard_size: int) -> int:
    shards = shard_count(images, shard_size)
    # A chunk of scales is written whole, the last one too.
    return round(_row_bytes(plane) * images) + shards * (index_bytes(shard_size) + shard_size * plane.scale_bytes)
