"""Image files: rounding, reproducible bytes, streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.evaluation.images import list_images, save_grid, save_npz, to_uint8


def pictures(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_floats_are_clamped_and_truncated_not_rounded() -> None:
    values = torch.tensor([-1.0, 0.0, 0.999 / 255, 254.999 / 255, 1.0, 7.0])
    assert to_uint8(values.expand(1, 3, 1, 6))[0, 0, :, 0].tolist() == [0, 0, 0, 254, 255, 255]


def test_bfloat16_is_converted_in_float32() -> None:
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    np.testing.assert_array_equal(to_uint8(x), to_uint8(x.float()))


def test_npz_reads_as_adm_s_evaluator_reads_it(tmp_path: Path) -> None:
    images, labels = pictures(5), np.array([3, 1, 2, 0, 1])
    save_npz(tmp_path / "a.npz", images, labels)
    loaded = np.load(tmp_path / "a.npz")
    assert loaded["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(loaded["arr_0"], images)
    np.testing.assert_array_equal(loaded["labels"], labels)
    assert loaded["labels"].dtype == np.int64


def test_npz_of_a_stream_is_byte_equal_to_that_of_the_array(tmp_path: Path) -> None:
    images = pictures(7)
    save_npz(tmp_path / "whole.npz", images)
    save_npz(tmp_path / "stream.npz", (images[i : i + 3] for i in range(0, 7, 3)), count=7)
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "stream.npz").read_bytes()


def test_a_stream_that_ends_early_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save_npz(tmp_path / "a.npz", iter([pictures(3)]), count=7)
    assert list(tmp_path.iterdir()) == []


def test_grid_places_images_row_by_row(tmp_path: Path) -> None:
    images = pictures(5)
    save_grid(tmp_path / "grid.png", images, 3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 8 + 2, 3 * 8 + 4, 3)
    np.testing.assert_array_equal(grid[:8, :8], images[0])
    np.testing.assert_array_equal(grid[10:, 10:18], images[4])
    assert (grid[10:, 20:] == 255).all()


def test_images_are_listed_by_path_with_folders_inside(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/9.webp", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["9.webp", "1.JPG", "2.png"]
