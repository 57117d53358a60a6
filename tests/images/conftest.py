"""Drawn photographs, and the reference's crop written down once more, from its definition and by PIL alone."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


def draw_photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges and some noise, uint8 [H, W, 3]: what JPEG is made for."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    y, x = np.mgrid[:height, :width]
    edges = np.where((x // 17 + y // 23) % 2, 25, -25)[..., None]
    return np.clip(smooth + edges + random.integers(-8, 9, (height, width, 3)), 0, 255).astype(np.uint8)


def encode_image(image: np.ndarray | Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, format, **options)
    return file.getvalue()


def crop_by_definition(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop: BOX halvings, BICUBIC to the short side, window with truncated offsets; uint8 [3, S, S]."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.fixture(scope="session")
def photo() -> Callable[..., np.ndarray]:
    return draw_photo


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture(scope="session")
def reference_crop() -> Callable[[bytes, int], np.ndarray]:
    """`reference_crop(encoded, size)`: decoded by PIL, cropped by definition."""
    return lambda data, size: crop_by_definition(Image.open(BytesIO(data)).convert("RGB"), size)


@pytest.fixture(scope="session")
def reference_crop_of() -> Callable[[Image.Image, int], np.ndarray]:
    return crop_by_definition


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """`write_files({"a/1.jpg": bytes})` makes the files and gives the folder."""

    def write(files: dict[str, bytes]) -> Path:
        for name, data in files.items():
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name).write_bytes(data)
        return tmp_path / "data"

    return write
