"""The GPU's resampler against PIL, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from rae_kernels import crop as op
from rae_kernels.crop import COLUMNS, ROWS, Pass, identity_pass

from rae_fast.images.crop import CropPlan, center_crop_pil, center_plan, resample_taps

# (height, width): halved never, once and twice; odd, tall enough for the vertical pass to come first, already square.
SIZES = [(40, 31), (75, 53), (16, 16), (131, 70), (17, 90), (33, 32)]


def passes_of(plan: CropPlan, height: int, width: int) -> list[Pass]:
    """A crop plan as passes, the last resize's cut to the window."""
    made = []
    for number, resize in enumerate(plan.resizes):
        last = number == len(plan.resizes) - 1
        windows = {COLUMNS: (plan.left, plan.size), ROWS: (plan.top, plan.size)}
        axes = [(COLUMNS, width, resize.width), (ROWS, height, resize.height)]
        for axis, before, after in axes[::-1] if resize.vertical_first else axes:
            first, count = windows[axis] if last else (0, after)
            if before == after:
                made.append(identity_pass(axis, first, count))
            else:
                taps = resample_taps(before, after, resize.filter)
                made.append(Pass(axis, taps.first_O[first : first + count], taps.taps_OK[first : first + count]))
        height, width = resize.height, resize.width
    return made


def images(seed: int = 0) -> list[np.ndarray]:
    noise = np.random.default_rng(seed)
    return [noise.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]


def check(device: str, size: int) -> None:
    pixels = images()
    plans = [passes_of(center_plan(i.shape[1], i.shape[0], size), *i.shape[:2]) for i in pixels]
    made = op.crop([torch.from_numpy(i).to(device) for i in pixels], plans, size)
    for image, result in zip(pixels, made.cpu(), strict=True):
        by_pil = np.asarray(center_crop_pil(Image.fromarray(image), size))
        assert np.array_equal(result.permute(1, 2, 0).numpy(), by_pil)


@pytest.mark.interpreter
def test_a_batch_of_many_sizes_has_pils_bytes_in_one_start_a_level() -> None:
    check("cpu", 16)


def test_plain_pytorch_has_pils_bytes() -> None:
    check("cpu", 16)


def test_only_what_the_window_depends_on_is_computed() -> None:
    plan = passes_of(center_plan(90, 17, 16), 17, 90)
    regions = op.trace((17, 90), plan, 16)
    assert regions[0].shape[0] == 17 and regions[0].shape[1] < 30
    assert regions[1].shape[1] == 16
    assert regions[-1] == op.Region(0, 16, 0, 16)


def test_passes_that_end_at_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="into 8 x 16"):
        op.crop([torch.zeros(16, 16, 3, dtype=torch.uint8)], [[identity_pass(ROWS, 4, 8)]], 16)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 256])
def test_a_batch_on_a_gpu_has_pils_bytes(size: int) -> None:
    check("cuda", size)
