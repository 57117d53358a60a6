"""Triton kernel of `crop`: one start for each level of passes, all images of the batch that have one in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.crop import PRECISION_BITS, Pass, Region
from rae_kernels.launch import Launch

# Of one image in one level, int64: where its pixels begin, their row length, the first row and column that are kept of
# them; where its result begins, its rows and columns, the first row and column of it; the axis; where the axis's first
# inputs and taps begin, and taps of an output; whether the result is the last one, which is planar.
FIELDS = (
    "source", "source_width", "source_top", "source_left", "target", "height", "width", "top", "left",
    "axis", "first", "taps", "length", "last",
)  # fmt: skip


@triton.jit
def pass_kernel(
    pixels, scratch, out, fields, first, taps, groups, FIELDS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """BLOCK bytes of one image's result of one pass."""
    row = fields + (tl.program_id(0) // groups) * FIELDS
    source, source_width = tl.load(row), tl.load(row + 1).to(tl.int32)
    source_top, source_left = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    target, height, width = tl.load(row + 4), tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    top, left = tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)
    by_rows, length, last = tl.load(row + 9) == 0, tl.load(row + 12).to(tl.int32), tl.load(row + 13) == 1
    n = (tl.program_id(0) % groups) * BLOCK + tl.arange(0, BLOCK)
    inside = n < height * width * 3
    channel = tl.where(last, n // (height * width), n % 3)
    place = tl.where(last, n % (height * width), n // 3)
    # Row and column of the stage's whole image: the tables of taps count from there.
    y, x = place // width + top, place % width + left
    output = tl.where(by_rows, y, x)
    start = tl.load(first + tl.load(row + 10) + output, mask=inside, other=0)
    begin_y, begin_x = tl.where(by_rows, start, y), tl.where(by_rows, x, start)
    address = ((begin_y - source_top) * source_width + (begin_x - source_left)) * 3 + channel
    step = tl.where(by_rows, source_width * 3, 3)
    table = taps + tl.load(row + 11) + output * length
    total = tl.full([BLOCK], 1 << (BITS - 1), tl.int32)
    for k in range(0, length):
        tap = tl.load(table + k, mask=inside, other=0)
        # A tap past the edge of the image is zero, and what lies there is not read.
        pixel = tl.load(pixels + source + address + k * step, mask=inside & (tap != 0), other=0)
        total += tap * pixel.to(tl.int32)
    byte = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)
    tl.store(out + target + n, byte, mask=inside & last)
    tl.store(scratch + target + n, byte, mask=inside & (last == 0))


@dataclass
class Level:
    """What one start of the kernel does: a row of fields for each image, and the tables of taps they point into."""

    fields: list[tuple[int, ...]] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=list)
    taps: list[np.ndarray] = field(default_factory=list)
    most_bytes: int = 0
    scratch_bytes: int = 0

    def add(self, source: tuple[int, int, int, int], step: Pass, region: Region, target: int, last: bool) -> None:
        """One image's pass from pixels at `source` to `region` of its result, stored at byte `target`."""
        height, width = region.shape
        tables = sum(len(f) for f in self.first), sum(t.size for t in self.taps)
        extent = (target, height, width, region.top, region.left)
        self.fields.append((*source, *extent, step.axis, *tables, step.taps_OK.shape[1], int(last)))
        self.first.append(step.first_O)
        self.taps.append(step.taps_OK)
        self.most_bytes = max(self.most_bytes, 3 * height * width)
        self.scratch_bytes += 0 if last else 3 * height * width

    def launch(self, pixels: Tensor, out: Tensor, config: dict[str, int]) -> tuple[Launch, Tensor]:
        """The launch and the bytes that the next level reads."""
        device = pixels.device
        scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=device)
        first = np.concatenate(self.first).astype(np.int32)
        taps = np.concatenate([t.ravel() for t in self.taps]).astype(np.int32)
        tables = {"fields": np.array(self.fields, np.int64), "first": first, "taps": taps}
        arguments = {"pixels": pixels, "scratch": scratch, "out": out}
        arguments |= {name: torch.from_numpy(table).to(device) for name, table in tables.items()}
        groups = triton.cdiv(self.most_bytes, config["block"])
        constants = {"FIELDS": len(FIELDS), "BLOCK": config["block"], "BITS": PRECISION_BITS}
        grid = (len(self.fields) * groups,)
        return Launch(pass_kernel, grid, arguments | {"groups": groups}, constants, config["warps"], 1), scratch


def level_launches(
    images: Sequence[Tensor],
    passes: Sequence[Sequence[Pass]],
    regions: Sequence[Sequence[Region]],
    size: int,
    config: dict[str, int],
) -> tuple[list[Launch], Tensor]:
    """The launches in turn and the result [B, 3, S, S] that they fill."""
    pixels = torch.cat([image.reshape(-1) for image in images])
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=pixels.device)
    begins = np.cumsum([0] + [image.numel() for image in images]).tolist()
    sources = [(begin, image.shape[1], 0, 0) for begin, image in zip(begins, images, strict=False)]
    launches = []
    for depth in range(max(len(steps) for steps in passes)):
        level = Level()
        for b, steps in enumerate(passes):
            if depth >= len(steps):
                continue
            region, last = regions[b][depth + 1], depth + 1 == len(steps)
            target = b * 3 * size * size if last else level.scratch_bytes
            level.add(sources[b], steps[depth], region, target, last)
            sources[b] = (target, region.shape[1], region.top, region.left)
        launch, pixels = level.launch(pixels, out, config)
        launches.append(launch)
    return launches, out
