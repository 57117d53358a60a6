"""Sets of images: the same pixels from whatever files they lie in, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_fast.errors import UserError
from rae_fast.evaluation.image_sets import PIECE, open_images, sampling_manifest
from rae_fast.evaluation.images import save_npz, save_png
from rae_fast.images.crop import center_crop_pil
from rae_fast.latents.store import open_store
from rae_fast.provenance import write_json


def pictures(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def save_folder(folder: Path, images: np.ndarray) -> None:
    for i, image in enumerate(images):
        save_png(folder / f"{i:06d}.png", image)


def test_folder_and_npz_stored_or_compressed_give_the_same_pieces(tmp_path: Path) -> None:
    images = pictures(2 * PIECE + 5)
    save_npz(tmp_path / "stored.npz", images)
    np.savez_compressed(tmp_path / "compressed.npz", images)
    save_folder(tmp_path / "folder", images)
    for name in ("stored.npz", "compressed.npz", "folder"):
        found = open_images(tmp_path / name)
        assert (found.count, found.size) == (len(images), (8, 8))
        pieces = list(found.pieces(0, found.count))
        assert [len(piece) for piece in pieces] == [PIECE, PIECE, 5]
        np.testing.assert_array_equal(np.concatenate(pieces), images)
        np.testing.assert_array_equal(np.concatenate(list(found.pieces(PIECE, PIECE + 9))), images[PIECE : PIECE + 9])


def test_pixels_of_a_store_are_those_of_its_valid_rows(pristine_store: Path) -> None:
    found, store = open_images(pristine_store), open_store(pristine_store)
    rows = np.flatnonzero(store.valid)
    assert found.count == len(rows) < store.n
    expected = store.read_pixels(rows).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(np.concatenate(list(found.pieces(0, found.count))), expected)


def test_images_of_a_folder_are_cropped_as_the_reference_crops(tmp_path: Path) -> None:
    for i, shape in enumerate(((40, 20), (17, 33))):
        (tmp_path / "raw").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)).save(
            tmp_path / f"raw/{i}.png"
        )
    (found,) = open_images(tmp_path / "raw", 16).pieces(0, 2)
    for i, image in enumerate(found):
        with Image.open(tmp_path / f"raw/{i}.png") as raw:
            np.testing.assert_array_equal(image, np.asarray(center_crop_pil(raw, 16)))
    with pytest.raises(UserError, match="--image-size"):
        list(open_images(tmp_path / "raw").pieces(0, 2))


def test_the_grid_beside_samples_is_no_sample(tmp_path: Path) -> None:
    save_folder(tmp_path / "images", pictures(3))
    save_png(tmp_path / "grid.png", pictures(1, 20)[0])
    write_json(tmp_path / "sampling.json", {"seed": 7})
    assert open_images(tmp_path).count == 3
    for place in (tmp_path, tmp_path / "images", tmp_path / "samples.npz"):
        assert sampling_manifest(place) == {"seed": 7}
    assert sampling_manifest(tmp_path / "images/deeper/a.npz") is None


def test_a_fingerprint_changes_with_the_files_and_with_the_crop(tmp_path: Path) -> None:
    save_folder(tmp_path / "folder", pictures(3))
    before = open_images(tmp_path / "folder").fingerprint
    assert open_images(tmp_path / "folder").fingerprint == before
    assert open_images(tmp_path / "folder", 8).fingerprint != before
    save_png(tmp_path / "folder/000001.png", pictures(1, seed=5)[0])
    assert open_images(tmp_path / "folder").fingerprint != before


def test_what_is_no_set_of_images_is_refused_by_name(tmp_path: Path, balanced_store: Path) -> None:
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
            list(open_images(tmp_path / name).pieces(0, 2))
    with pytest.raises(UserError, match="holds no pixels"):
        open_images(balanced_store)
