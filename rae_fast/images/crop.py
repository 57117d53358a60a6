"""The crops of the reference, as a plan that PIL, a native loop, torch and a Triton kernel carry out to the same bytes.

PIL resamples uint8 images by fixed-point taps of 22 bits: horizontally, rounded to uint8, then vertically (tall images
the other way round, since some version after 11.3). Whoever uses the same integers in the same order gets the same
bytes, on any device; that is what `resample_taps` and `Resize.vertical_first` are for.

Shapes: H, W height and width of a decoded image, S side of the crop, O output samples, I input samples, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BOX, BICUBIC = "box", "bicubic"
PIL_FILTERS = {BOX: Image.Resampling.BOX, BICUBIC: Image.Resampling.BICUBIC}
SUPPORT = {BOX: 0.5, BICUBIC: 2.0}
PRECISION_BITS = 22  # of PIL's fixed-point taps for uint8: 32 - 8 bits of pixel - 2 bits of headroom
# A strip of 1 x 100,000 pixels would be blown up to gigabytes: the same bound that PIL sets on decoding.
MAX_RESIZED_PIXELS = 178_956_970


class Resize(NamedTuple):
    """Resample the whole image to `width` x `height`, one axis after the other."""

    width: int
    height: int
    filter: str
    vertical_first: bool = False


@dataclass(frozen=True)
class CropPlan:
    """Resizes in turn, then the window of `size` x `size` pixels at (`left`, `top`)."""

    resizes: tuple[Resize, ...]
    left: int
    top: int
    size: int


class Taps(NamedTuple):
    """Output o = clip8((2**21 + sum_k taps_OK[o, k] * input[first_O[o] + k]) >> 22), k below count_O[o]."""

    first_O: np.ndarray
    count_O: np.ndarray
    taps_OK: np.ndarray


def center_plan(width: int, height: int, size: int) -> CropPlan:
    """ADM's centre crop, which DiT, SiT and RAE use: halve with BOX while min side >= 2 S, BICUBIC to min side = S.

    Raises:
        ValueError: the image is so narrow that its resized form would exceed PIL's limit on pixels.
    """
    resizes = []
    while min(width, height) >= 2 * size:
        resizes.append(_resize(width, height, width // 2, height // 2, BOX))
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    last = _resize(width, height, round(width * scale), round(height * scale), BICUBIC)
    return CropPlan((*resizes, last), (last.width - size) // 2, (last.height - size) // 2, size)


def random_plan(width: int, height: int, size: int, short_side: int, u_top: float, u_left: float) -> CropPlan:
    """The decoder's training crop: BICUBIC to `short_side`, then a window placed by two uniforms in [0, 1).

    torchvision's Resize(short_side) and RandomCrop(size), whose offset is uniform over all that fit.

    Raises:
        ValueError: the image is so narrow that its resized form would exceed PIL's limit on pixels.
    """
    assert short_side >= size
    long_side = int(short_side * max(width, height) / min(width, height))
    to = (short_side, long_side) if width <= height else (long_side, short_side)
    resize = _resize(width, height, *to, BICUBIC)
    left, top = int(u_left * (resize.width - size + 1)), int(u_top * (resize.height - size + 1))
    return CropPlan((resize,), left, top, size)


def _resize(width: int, height: int, new_width: int, new_height: int, filter: str) -> Resize:
    if new_width * new_height > MAX_RESIZED_PIXELS:
        raise ValueError(f"too narrow: it would be resized to {new_width} x {new_height} pixels")
    shrink_w, shrink_h = width - new_width, height - new_height
    tall = shrink_h > 0 and shrink_h > 2 * shrink_w
    return Resize(new_width, new_height, filter, tall and pil_takes_tall_images_vertically())


@cache
def pil_takes_tall_images_vertically() -> bool:
    """Whether the installed Pillow runs the vertical pass first where height shrinks by more than twice the width.

    Found out by trial, since it changes the bytes of portraits of more than 2:1 and nothing announces it.
    """
    tall_HW3 = np.tile((np.arange(64 * 8) * 2654435761 >> 7 & 255).astype(np.uint8).reshape(64, 8, 1), (1, 1, 3))
    by_pil = np.asarray(Image.fromarray(tall_HW3).resize((6, 24), resample=Image.Resampling.BICUBIC))
    orders = [
        crop_exact(torch.from_numpy(tall_HW3), CropPlan((Resize(6, 24, BICUBIC, vertical_first),), 0, 9, 6))
        for vertical_first in (False, True)
    ]
    assert not orders[0].equal(orders[1])
    return orders[1].equal(torch.from_numpy(by_pil[9:15].transpose(2, 0, 1).copy()))


def crop_pil(image: Image.Image, plan: CropPlan) -> Image.Image:
    """Carry out a plan on an RGB image by PIL itself."""
    for resize in plan.resizes:
        image = image.resize((resize.width, resize.height), resample=PIL_FILTERS[resize.filter])
    return image.crop((plan.left, plan.top, plan.left + plan.size, plan.top + plan.size))


def center_crop_pil(image: Image.Image, size: int) -> Image.Image:
    """The reference's centre crop of an RGB image to `size` x `size`, by PIL."""
    return crop_pil(image, center_plan(image.width, image.height, size))


@lru_cache(maxsize=2048)
def resample_taps(in_size: int, out_size: int, filter: str) -> Taps:
    """PIL's fixed-point taps for one axis: first_O and count_O int32 [O], taps_OK int32 [O, K], zero past the count.

    w(o, i) = f((i - c_o + 1/2) / max(s, 1)), c_o = (o + 1/2) s, s = in/out, normalized to sum 1 in float64, then
    rounded to 22 bits (Pillow, src/libImaging/Resample.c: precompute_coeffs, normalize_coeffs_8bpc).
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    support = SUPPORT[filter] * stretch
    center_O = (np.arange(out_size) + 0.5) * scale
    first_O = np.maximum((center_O - support + 0.5).astype(np.int64), 0)
    count_O = np.minimum((center_O + support + 0.5).astype(np.int64), in_size) - first_O
    k_K = np.arange(ceil(support) * 2 + 1)
    weight_OK = _filter_value((k_K + first_O[:, None] - center_O[:, None] + 0.5) * (1.0 / stretch), filter)
    weight_OK[k_K >= count_O[:, None]] = 0.0
    # Summed one tap after the other: numpy's pairwise sum rounds differently.
    total_O = np.zeros(out_size)
    for k in k_K:
        total_O += weight_OK[:, k]
    weight_OK /= np.where(total_O == 0.0, 1.0, total_O)[:, None]
    fixed_OK = weight_OK * (1 << PRECISION_BITS)
    taps_OK = np.where(fixed_OK < 0, fixed_OK - 0.5, fixed_OK + 0.5).astype(np.int32)
    width = max(int(count_O.max()), 1)
    return Taps(first_O.astype(np.int32), count_O.astype(np.int32), np.ascontiguousarray(taps_OK[:, :width]))


def _filter_value(x: np.ndarray, filter: str) -> np.ndarray:
    """BOX: 1 on (-1/2, 1/2]. BICUBIC: Keys' cubic with a = -1/2, evaluated in PIL's order of operations."""
    if filter == BOX:
        return ((x > -0.5) & (x <= 0.5)).astype(np.float64)
    a = -0.5
    x = np.abs(x)
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def crop_exact(image_HW3: Tensor, plan: CropPlan) -> Tensor:
    """Carry out a plan with PIL's integers on the image's own device: uint8 [H, W, 3] -> uint8 [3, S, S].

    Each pass is a product with the matrix of taps in float64, in which all sums of 8-bit pixels by 22-bit taps are
    exact. Only the rows and columns that the window needs are computed.
    """
    x_3HW = image_HW3.permute(2, 0, 1)
    for step, resize in enumerate(plan.resizes):
        last = step == len(plan.resizes) - 1
        columns = (plan.left, plan.left + plan.size) if last else (0, resize.width)
        rows = (plan.top, plan.top + plan.size) if last else (0, resize.height)
        if resize.vertical_first:
            x_3HW = _pass(x_3HW.transpose(1, 2), resize.height, resize.filter, rows).transpose(1, 2)
        x_3HW = _pass(x_3HW, resize.width, resize.filter, columns)
        if not resize.vertical_first:
            x_3HW = _pass(x_3HW.transpose(1, 2), resize.height, resize.filter, rows).transpose(1, 2)
    return x_3HW.contiguous()


def center_crop_exact(image_HW3: Tensor | np.ndarray, size: int) -> Tensor:
    """The reference's centre crop without PIL: uint8 [H, W, 3] -> uint8 [3, S, S], equal to PIL's bit for bit."""
    image_HW3 = torch.as_tensor(image_HW3)
    height, width = image_HW3.shape[:2]
    return crop_exact(image_HW3, center_plan(width, height, size))


def _pass(x_CAI: Tensor, out_size: int, filter: str, window: tuple[int, int]) -> Tensor:
    """Samples window[0]..window[1] of the last axis resampled to `out_size`: uint8 [C, A, I] -> uint8 [C, A, O]."""
    in_size = x_CAI.shape[2]
    if in_size == out_size:
        return x_CAI[:, :, window[0] : window[1]]
    taps_OI = _tap_matrix(in_size, out_size, filter, *window, x_CAI.device)
    sums_CAO = (x_CAI.to(torch.float64) @ taps_OI.T).to(torch.int64)
    return ((sums_CAO + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=512)
def _tap_matrix(in_size: int, out_size: int, filter: str, first: int, last: int, device: torch.device) -> Tensor:
    """Rows first..last of the taps as a dense float64 matrix [O, I] on `device`."""
    taps = resample_taps(in_size, out_size, filter)
    matrix_OI = np.zeros((last - first, in_size))
    for row, o in enumerate(range(first, last)):
        count = taps.count_O[o]
        matrix_OI[row, taps.first_O[o] : taps.first_O[o] + count] = taps.taps_OK[o, :count]
    return torch.from_numpy(matrix_OI).to(device)
