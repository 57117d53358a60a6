"""Every way of carrying out a crop gives PIL's bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from rae_kernels import crop as kernel
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from rae_fast.images.crop import (
    BICUBIC,
    BOX,
    PIL_FILTERS,
    center_crop_exact,
    center_crop_pil,
    center_plan,
    crop_exact,
    crop_pil,
    pil_takes_tall_images_vertically,
    random_plan,
    resample_taps,
)
from rae_fast.images.device_crop import crop_batch, plan_passes
from rae_fast.images.resample import crop_into

MAX_RESIZED = 3_000_000  # keeps PIL's share of the test short


def noise(width: int, height: int, seed: int, *, extreme: bool = False) -> np.ndarray:
    """Noise is the hardest case: every tap shows. `extreme`: only 0 and 255, so that sums leave the range."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(values < 128, 0, 255).astype(np.uint8) if extreme else values


@given(
    width=st.integers(1, 420),
    height=st.integers(1, 420),
    size=st.sampled_from([8, 31, 64, 100]),
    seed=st.integers(0, 999),
    extreme=st.booleans(),
)
@example(width=257, height=256, size=64, seed=0, extreme=False)
@example(width=128, height=128, size=64, seed=0, extreme=False)
@example(width=88, height=420, size=16, seed=0, extreme=False)
@example(width=101, height=300, size=100, seed=0, extreme=True)
@example(width=64, height=90, size=64, seed=0, extreme=False)
@example(width=1, height=7, size=8, seed=0, extreme=False)
def test_every_crop_gives_the_reference_s_bytes(
    width: int, height: int, size: int, seed: int, extreme: bool, reference_crop_of: Callable
) -> None:
    plan = center_plan(width, height, size)
    assume(plan.resizes[-1].width * plan.resizes[-1].height <= MAX_RESIZED)
    image_HW3 = noise(width, height, seed, extreme=extreme)
    expected = reference_crop_of(Image.fromarray(image_HW3), size)

    by_cpu = np.empty((3, size, size), np.uint8)
    crop_into(image_HW3, plan, by_cpu)

    assert np.array_equal(np.asarray(center_crop_pil(Image.fromarray(image_HW3), size)).transpose(2, 0, 1), expected)
    assert np.array_equal(center_crop_exact(image_HW3, size).numpy(), expected)
    assert np.array_equal(by_cpu, expected)


@given(
    width=st.integers(20, 300),
    height=st.integers(20, 300),
    places=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
def test_the_training_crop_is_torchvision_s_resize_and_window(
    width: int, height: int, places: tuple[float, float]
) -> None:
    image_HW3 = noise(width, height, 1)
    plan = random_plan(width, height, 32, 48, *places)
    resized = vision.resize(Image.fromarray(image_HW3), 48, InterpolationMode.BICUBIC)
    expected = np.asarray(vision.crop(resized, plan.top, plan.left, 32, 32)).transpose(2, 0, 1)

    by_cpu = np.empty((3, 32, 32), np.uint8)
    crop_into(image_HW3, plan, by_cpu)

    assert np.array_equal(crop_exact(torch.from_numpy(image_HW3), plan).numpy(), expected)
    assert np.array_equal(by_cpu, expected)


SIZES = [(97, 60), (60, 97), (64, 64), (40, 200), (200, 40), (24, 24), (24, 31), (150, 149), (9, 300)]


def test_the_taps_handed_to_the_kernel_give_the_reference_s_bytes(reference_crop_of: Callable) -> None:
    images_HW3 = [noise(width, height, 7) for width, height in SIZES]
    passes = [plan_passes(center_plan(width, height, 24), height, width) for width, height in SIZES]
    crops = kernel.crop([torch.from_numpy(image) for image in images_HW3], passes, 24)
    for image_HW3, crop in zip(images_HW3, crops, strict=True):
        assert np.array_equal(crop.numpy(), reference_crop_of(Image.fromarray(image_HW3), 24))


def test_a_batch_is_cropped_on_its_device_without_triton_too(reference_crop_of: Callable) -> None:
    images_HW3 = [noise(width, height, 8) for width, height in SIZES]
    plans = [center_plan(width, height, 24) for width, height in SIZES]
    crops = crop_batch([torch.from_numpy(image) for image in images_HW3], plans, 24)
    for image_HW3, crop in zip(images_HW3, crops, strict=True):
        assert np.array_equal(crop.numpy(), reference_crop_of(Image.fromarray(image_HW3), 24))


def test_random_windows_reach_both_ends_and_never_beyond() -> None:
    last = np.nextafter(np.float32(1), np.float32(0))
    first_plan, last_plan = (random_plan(500, 300, 256, 384, u, u) for u in (0.0, float(last)))
    assert (first_plan.top, first_plan.left) == (0, 0)
    assert (last_plan.top, last_plan.left) == (384 - 256, 640 - 256)


@pytest.mark.parametrize(("width", "left"), [(65, 0), (66, 1), (67, 1), (68, 2)])
def test_odd_margins_are_cut_at_the_truncated_offset(width: int, left: int) -> None:
    image_HW3 = noise(width, 64, 0)
    expected = image_HW3[:, left : left + 64].transpose(2, 0, 1)
    assert np.array_equal(center_crop_exact(image_HW3, 64).numpy(), expected)


def test_the_grid_of_a_resize_spans_the_whole_image_although_its_size_was_rounded() -> None:
    # 500 x 333 to a short side of 64 is 96.096 x 64: PIL's scale is 500 / 96, a true scale would be 333 / 64.
    taps = resample_taps(500, 96, BICUBIC)
    centers = taps.first_O + (taps.taps_OK * np.arange(taps.taps_OK.shape[1])).sum(1) / taps.taps_OK.sum(1)
    assert np.allclose(centers[5:-5], ((np.arange(96) + 0.5) * 500 / 96 - 0.5)[5:-5], atol=0.02)


@pytest.mark.parametrize("filter", [BOX, BICUBIC])
@pytest.mark.parametrize(("in_size", "out_size"), [(39, 19), (500, 341), (64, 200), (1000, 3), (1, 5)])
def test_taps_are_pil_s_response_to_single_pixels(in_size: int, out_size: int, filter: str) -> None:
    taps = resample_taps(in_size, out_size, filter)
    dense = np.zeros((out_size, in_size), np.int64)
    for o in range(out_size):
        dense[o, taps.first_O[o] : taps.first_O[o] + taps.count_O[o]] = taps.taps_OK[o, : taps.count_O[o]]
    expected = np.stack(
        [
            np.asarray(Image.fromarray(impulse[None]).resize((out_size, 1), PIL_FILTERS[filter]))[0]
            for impulse in np.eye(in_size, dtype=np.uint8) * 255
        ],
        axis=1,
    )
    assert np.array_equal(np.clip((dense * 255 + (1 << 21)) >> 22, 0, 255), expected)
    assert (taps.taps_OK[np.arange(taps.taps_OK.shape[1]) >= taps.count_O[:, None]] == 0).all()


def test_the_pass_order_of_tall_images_follows_the_installed_pillow() -> None:
    image_HW3 = noise(60, 400, 3)
    assert center_plan(60, 400, 24).resizes[0].vertical_first == pil_takes_tall_images_vertically()
    assert not center_plan(400, 60, 24).resizes[0].vertical_first
    expected = np.asarray(Image.fromarray(image_HW3).resize((30, 200), resample=Image.Resampling.BOX))
    plan = center_plan(60, 400, 24)
    window = np.asarray(crop_pil(Image.fromarray(expected), center_plan(30, 200, 24))).transpose(2, 0, 1)
    assert np.array_equal(crop_exact(torch.from_numpy(image_HW3), plan).numpy(), window)


def test_a_strip_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too narrow: it would be resized to 256 x 2560000"):
        center_plan(1, 10_000, 256)
