from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from rae_fast.demo import shapes
from rae_fast.demo.shapes import CLASSES, ODD_FILES, RADIUS, RECORD, class_of, draw_dataset, draw_picture
from rae_fast.errors import UserError
from rae_fast.provenance import read_json, sha256_file

IMAGES, HELD_OUT = 48, 16


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder, images=IMAGES, held_out=HELD_OUT, workers=2)
    return folder


def files(folder: Path) -> dict[str, str]:
    """Path inside `folder` -> digest of the bytes, for all JPEGs."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.jpg"))}


def odd_file(folder: Path, kind: str) -> Path:
    (path,) = folder.glob(f"train/*/*-{kind}.jpg")
    return path


def center_crop(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def test_classes_have_equally_many_images(drawn: Path) -> None:
    assert len(CLASSES) >= 8
    for split, count in (("train", IMAGES), ("val", HELD_OUT)):
        sizes = Counter(path.parent.name for path in (drawn / split).rglob("*.jpg"))
        assert sizes == dict.fromkeys(CLASSES, count // len(CLASSES))


def test_held_out_pictures_differ_from_training_pictures(drawn: Path) -> None:
    digests = list(files(drawn).values())
    assert len(set(digests)) == len(digests)


def test_drawing_depends_on_the_seed_alone(drawn: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "again", images=IMAGES, held_out=HELD_OUT, workers=1)
    draw_dataset(tmp_path / "other", images=IMAGES, held_out=HELD_OUT, seed=1)
    assert files(tmp_path / "again") == files(drawn)
    assert set(files(tmp_path / "other").values()).isdisjoint(files(drawn).values())


def test_more_images_leave_the_first_ones_as_they_are() -> None:
    assert class_of(8) == class_of(0)
    first, second = draw_picture(0, "train", 3), draw_picture(0, "train", 3)
    assert first.tobytes() == second.tobytes()
    assert draw_picture(0, "val", 3).tobytes() != first.tobytes()


def test_interrupted_drawing_goes_on_to_the_same_files(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = shapes._write_picture, []

    def write_some(path: Path, split: str, index: int, seed: int) -> None:
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(path)
        write(path, split, index, seed)

    monkeypatch.setattr(shapes, "_write_picture", write_some)
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path, images=IMAGES, held_out=HELD_OUT, workers=1)
    monkeypatch.setattr(shapes, "_write_picture", write)
    assert not read_json(tmp_path / RECORD)["finished"]
    kept = {path: path.stat().st_mtime_ns for path in written}
    leftover = written[0].with_name(".00099.jpg.abc.part")
    leftover.write_bytes(b"half a file")
    draw_dataset(tmp_path, images=IMAGES, held_out=HELD_OUT)
    assert files(tmp_path) == files(drawn)
    assert {path: path.stat().st_mtime_ns for path in written} == kept
    assert not leftover.exists()
    assert read_json(tmp_path / RECORD)["finished"]


def test_finished_drawing_is_not_drawn_again(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_write_picture", lambda *_: pytest.fail("drew a picture"))
    dataset = draw_dataset(drawn, images=IMAGES, held_out=HELD_OUT)
    assert dataset.train == drawn / "train" and dataset.val == drawn / "val"


def test_folder_of_another_drawing_is_refused(drawn: Path) -> None:
    with pytest.raises(UserError, match=r"'seed': 0.*'seed': 7.*remove that folder"):
        draw_dataset(drawn, images=IMAGES, held_out=HELD_OUT, seed=7)


def test_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        draw_dataset(tmp_path / "file", images=1, held_out=0)


def test_sizes_and_aspects_vary(drawn: Path) -> None:
    sizes = {Image.open(path).size for path in drawn.rglob("*.jpg")}
    assert len({min(size) for size in sizes}) > 10
    aspects = [width / height for width, height in sizes]
    assert min(aspects) < 0.8 and max(aspects) > 1.25


def test_odd_files_are_what_their_names_say(drawn: Path) -> None:
    assert Image.open(odd_file(drawn, "grayscale")).mode == "L"
    assert Image.open(odd_file(drawn, "cmyk")).mode == "CMYK"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(OSError, match="truncated"):
        Image.open(odd_file(drawn, "truncated")).load()
    whole = [path for path in drawn.rglob("*.jpg") if "-" not in path.name]
    assert all(Image.open(path).mode == "RGB" and not Image.open(path).getexif() for path in whole)


def test_rotated_file_shows_the_scene_upright_once_its_orientation_is_applied(drawn: Path) -> None:
    (index,) = (number for number, kind in ODD_FILES.items() if kind == "rotated")
    scene = draw_picture(0, "train", index)
    stored = Image.open(odd_file(drawn, "rotated"))
    upright = ImageOps.exif_transpose(stored)
    assert upright.size == scene.size and stored.size == scene.size[::-1]
    difference = np.abs(np.asarray(upright, dtype=float) - np.asarray(scene, dtype=float))
    assert difference.mean() < 8


@pytest.mark.parametrize("class_name", CLASSES)
def test_center_crop_keeps_every_shape_whole(class_name: str) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        width, height = (120, 90) if seed % 2 else (90, 120)
        mask = shapes._shape_mask(rng, width, height, shapes.OUTLINES[class_name])
        inside = np.asarray(center_crop(Image.fromarray(mask)))
        assert inside.sum() == pytest.approx(mask.sum())
        assert mask.max() == 1 and mask.sum() > 0.03 * 90 * 90
        border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        assert border.max() == 0


@pytest.mark.parametrize("class_name", CLASSES)
def test_shapes_are_mirror_symmetric(class_name: str) -> None:
    mask = Image.new("L", (201, 201))
    outline = [polygon * RADIUS[1] for polygon in shapes.OUTLINES[class_name]]
    shapes._fill_outline(mask, outline, 201, np.array([100.0, 100.0]))
    pixels = np.asarray(mask) > 0
    assert pixels.mean() > 0.05
    assert (pixels != pixels[:, ::-1]).sum() < 0.1 * pixels.sum()


def test_colour_says_nothing_about_the_class() -> None:
    """Mean colours of the classes, ground and shape alike, lie within the scatter of the means of random groups."""
    per_class = 24
    colors = np.array(
        [np.asarray(draw_picture(0, "train", i).resize((1, 1))).reshape(3) for i in range(per_class * len(CLASSES))]
    ).astype(float)
    by_class = colors.reshape(per_class, len(CLASSES), 3)
    scatter = by_class.mean(0).std(0, ddof=1) / (colors.std(0) / np.sqrt(per_class))
    assert (scatter < 1.8).all()


def test_every_shape_stands_out_in_grayscale() -> None:
    for seed in range(50):
        ground, shape = shapes._color_pair(np.random.default_rng(seed))
        assert abs(shapes._luma(ground) - shapes._luma(shape)) >= shapes.LUMA_CONTRAST
