"""The reference's crops, byte for byte (golden README, section 5)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.images.crop import (
    BICUBIC,
    CropPlan,
    Resize,
    center_crop_exact,
    center_crop_pil,
    center_plan,
    crop_exact,
    crop_pil,
)
from rae_fast.images.resample import crop_into


def by_native(image_HW3: np.ndarray, size: int) -> np.ndarray:
    out_3SS = np.empty((3, size, size), np.uint8)
    crop_into(image_HW3, center_plan(image_HW3.shape[1], image_HW3.shape[0], size), out_3SS)
    return out_3SS.transpose(1, 2, 0)


WAYS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "pil": lambda image_HW3, size: np.asarray(center_crop_pil(Image.fromarray(image_HW3), size)),
    "torch": lambda image_HW3, size: center_crop_exact(image_HW3, size).permute(1, 2, 0).numpy(),
    "native": by_native,
}


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "index.json").read_text())["rows"]


def load(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))


@pytest.fixture
def folder(golden_file: Callable[[str], Path]) -> Path:
    return golden_file("center_crop/index.json").parent


@pytest.mark.parametrize("way", WAYS)
def test_center_crops_are_the_reference_s_bytes(folder: Path, way: str) -> None:
    for row in rows(folder):
        crop_SS3 = np.ascontiguousarray(WAYS[way](load(folder / row["input"]), row["size"]))
        assert hashlib.sha256(crop_SS3.tobytes()).hexdigest() == row["sha256_rgb"], row["output"]
        assert np.array_equal(crop_SS3, load(folder / row["output"]))


TRAINING_CROP = r"stage1_resize(\d+)_crop(\d+)_top(\d+)_left(\d+)_of_(\w+)\.png"


def test_the_decoder_s_training_crop_is_the_reference_s_bytes(folder: Path) -> None:
    found = [match for file in sorted(folder.glob("*.png")) if (match := re.fullmatch(TRAINING_CROP, file.name))]
    if not found:
        pytest.skip("no crops of decoder training in this folder")
    for match in found:
        short_side, size, top, left = (int(number) for number in match.groups()[:4])
        image_HW3, expected_SS3 = load(folder / f"in_{match[5]}.png"), load(folder / match[0])
        height, width = image_HW3.shape[:2]
        sides = [int(short_side * side / min(width, height)) for side in (width, height)]
        plan = CropPlan((Resize(*sides, BICUBIC),), left=left, top=top, size=size)
        out_3SS = np.empty((3, size, size), np.uint8)
        crop_into(image_HW3, plan, out_3SS)
        assert np.array_equal(np.asarray(crop_pil(Image.fromarray(image_HW3), plan)), expected_SS3)
        assert np.array_equal(crop_exact(torch.from_numpy(image_HW3), plan).permute(1, 2, 0).numpy(), expected_SS3)
        assert np.array_equal(out_3SS.transpose(1, 2, 0), expected_SS3)
