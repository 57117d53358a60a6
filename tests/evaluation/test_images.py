"""Image files: rounding, reproducible bytes, streams, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.errors import UserError
from rae_fast.evaluation.images import image_batches, list_images, save_grid, save_npz, save_png, to_uint8


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


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_folder_and_npz_give_the_same_batches_in_order(tmp_path: Path, batch: int) -> None:
    images = pictures(5)
    save_npz(tmp_path / "a.npz", images)
    for i, image in enumerate(images):
        save_png(tmp_path / "folder" / f"{i:06d}.png", image)
    for source in (tmp_path / "a.npz", tmp_path / "folder"):
        parts = list(image_batches(source, batch))
        assert max(len(part) for part in parts) <= batch
        np.testing.assert_array_equal(np.concatenate(parts), images)


def test_compressed_npz_is_read_too(tmp_path: Path) -> None:
    images = pictures(5)
    np.savez_compressed(tmp_path / "a.npz", images)
    np.testing.assert_array_equal(np.concatenate(list(image_batches(tmp_path / "a.npz", 2))), images)


def test_what_is_no_set_of_images_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_png(tmp_path / "mixed" / "a.png", pictures(1)[0])
    save_png(tmp_path / "mixed" / "b.png", pictures(1, size=9)[0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    np.savez(tmp_path / "wrong_key.npz", images=pictures(2))
    np.savez(tmp_path / "floats.npz", pictures(2).astype(np.float32))
    (tmp_path / "torn.npz").write_bytes(b"PK torn")
    for name, message in {
        "missing": "not a folder",
        "empty": "holds no image",
        "mixed": "9x9",
        "broken": r"a\.png cannot be read",
        "wrong_key.npz": "no arr_0",
        "floats.npz": "float32",
        "torn.npz": "cannot be read",
        "missing.npz": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            list(image_batches(tmp_path / name, 4))


def test_images_are_listed_by_path_with_folders_inside(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a/9.webp", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["9.webp", "1.JPG", "2.png"]
