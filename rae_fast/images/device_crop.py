"""Crops of a batch on the device that its images lie on: one Triton launch a pass, or float64 products without Triton.

Shapes: H, W height and width of an image, B images, S side of the crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rae_kernels import crop as kernel
from rae_kernels.launch import use_triton
from torch import Tensor

from rae_fast.images.crop import CropPlan, crop_exact, resample_taps


def crop_batch(images_HW3: Sequence[Tensor], plans: Sequence[CropPlan], size: int) -> Tensor:
    """Carry out a plan for each image, with PIL's bytes: uint8 [H, W, 3] each, on one device -> uint8 [B, 3, S, S]."""
    if use_triton(images_HW3[0]):
        passes = [plan_passes(plan, *image.shape[:2]) for plan, image in zip(plans, images_HW3, strict=True)]
        return kernel.crop([image.contiguous() for image in images_HW3], passes, size)
    return torch.stack([crop_exact(image, plan) for image, plan in zip(images_HW3, plans, strict=True)])


def plan_passes(plan: CropPlan, height: int, width: int) -> list[kernel.Pass]:
    """The plan as passes of taps over an image of `height` x `width`; the last two cut out the window."""
    passes = []
    for step, resize in enumerate(plan.resizes):
        last = step == len(plan.resizes) - 1
        columns = _pass(kernel.COLUMNS, width, resize.width, resize.filter, plan.left if last else None, plan.size)
        rows = _pass(kernel.ROWS, height, resize.height, resize.filter, plan.top if last else None, plan.size)
        ordered = (rows, columns) if resize.vertical_first else (columns, rows)
        passes += [one for one in ordered if one is not None]
        width, height = resize.width, resize.height
    return passes


def _pass(axis: int, in_size: int, out_size: int, filter: str, window: int | None, size: int) -> kernel.Pass | None:
    """Outputs window..window + size of one axis, or all of them if it is None; None where nothing is to be done."""
    if in_size == out_size:
        return None if window is None else kernel.identity_pass(axis, window, size)
    taps = resample_taps(in_size, out_size, filter)
    kept = slice(None) if window is None else slice(window, window + size)
    return kernel.Pass(axis, taps.first_O[kept], taps.taps_OK[kept])
