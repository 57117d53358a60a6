"""Resampling of 8-bit images by fixed-point taps, with the same bytes on any device as PIL on the CPU.

    out[o] = clip8((2^21 + sum_k taps[o, k] in[first[o] + k]) >> 22)        (Pillow, src/libImaging/Resample.c)

one axis after the other, rounded to 8 bits in between; integers only, so nothing depends on the order of additions. The
taps come from the caller; a batch holds images of any sizes, each with its own passes.

Shapes: B images, H, W their sizes, O outputs of a pass, K taps, S side of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rae_kernels import tuning
from rae_kernels.launch import use_triton

PRECISION_BITS = 22
ROWS, COLUMNS = 0, 1
DEFAULT_CONFIG = {"block": 512, "warps": 4}


class Pass(NamedTuple):
    """One resampling along one axis: first_O int32 [O], taps_OK int32 [O, K], zero where an output has fewer taps.

    No output reads beyond the image with a tap that is not zero.
    """

    axis: int
    first_O: np.ndarray
    taps_OK: np.ndarray


@dataclass(frozen=True)
class Region:
    """Rows [top, bottom) and columns [left, right) of an image."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.bottom - self.top, self.right - self.left

    def along(self, axis: int) -> tuple[int, int]:
        """First and last + 1 on an axis."""
        return (self.top, self.bottom) if axis == ROWS else (self.left, self.right)

    def replaced(self, axis: int, first: int, last: int) -> Region:
        """The region with another extent on one axis."""
        if axis == ROWS:
            return Region(first, last, self.left, self.right)
        return Region(self.top, self.bottom, first, last)


def identity_pass(axis: int, first: int, count: int) -> Pass:
    """A pass that copies `count` rows or columns from `first` on."""
    taps = np.full((count, 1), 1 << PRECISION_BITS, np.int32)
    return Pass(axis, np.arange(first, first + count, dtype=np.int32), taps)


def crop(images: Sequence[Tensor], passes: Sequence[Sequence[Pass]], size: int) -> Tensor:
    """Resample each image by its passes in turn: uint8 [H, W, 3] each -> uint8 [B, 3, S, S].

    Args:
        images: on one device, contiguous.
        passes: at least one for each image; what the last ones leave is S x S.
        size: S.

    Raises:
        ValueError: an image without passes, or passes that do not end at S x S.
    """
    if len(images) != len(passes):
        raise ValueError(f"{len(images)} images with passes for {len(passes)}")
    plans = [trace(image.shape[:2], steps, size) for image, steps in zip(images, passes, strict=True)]
    if not images or not use_triton(images[0]):
        made = [reference(image, steps) for image, steps in zip(images, passes, strict=True)]
        return torch.stack(made) if made else torch.empty(0, 3, size, size, dtype=torch.uint8)
    from rae_kernels.crop_triton import level_launches

    config = tuning.lookup("crop", {"size": size}, torch.uint8, images[0].device, DEFAULT_CONFIG)
    launches, out = level_launches(images, passes, plans, size, config)
    for launch in launches:
        launch.run()
    return out


def reference(image_HW3: Tensor, passes: Sequence[Pass]) -> Tensor:
    """The passes in plain PyTorch, in int64: uint8 [H, W, 3] -> uint8 [3, S, S]."""
    x = image_HW3
    for axis, first_O, taps_OK in passes:
        taps = torch.from_numpy(taps_OK).to(x.device, torch.int64)
        places = torch.from_numpy(first_O).to(x.device, torch.int64)[:, None] + torch.arange(taps.shape[1]).to(x.device)
        # A tap past the edge is zero: any pixel does for it.
        read = x.movedim(axis, 0)[places.clamp_(max=x.shape[axis] - 1)].to(torch.int64)
        sums = (taps[:, :, None, None] * read).sum(1) + (1 << (PRECISION_BITS - 1))
        x = (sums >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8).movedim(0, axis)
    return x.permute(2, 0, 1).contiguous()


def trace(shape: tuple[int, int], passes: Sequence[Pass], size: int) -> list[Region]:
    """The part of each stage's image, from the input on, that the result depends on; its last entry is the result.

    Raises:
        ValueError: no passes, or passes that do not end at `size` x `size`.
    """
    height, width = shape
    for axis, first_O, _ in passes:
        height, width = (len(first_O), width) if axis == ROWS else (height, len(first_O))
    if not passes or (height, width) != (size, size):
        raise ValueError(f"{len(passes)} passes that turn {shape[0]} x {shape[1]} pixels into {height} x {width}")
    regions = [Region(0, size, 0, size)]
    for axis, first_O, taps_OK in reversed(passes):
        start, end = regions[0].along(axis)
        reach = first_O[start:end] + (taps_OK[start:end] != 0).cumsum(1).argmax(1) + 1
        regions.insert(0, regions[0].replaced(axis, int(first_O[start:end].min()), int(reach.max())))
    return regions
