import pytest
from PIL import Image

from rae_fast.demo.photos import HOLD_OUT_EVERY, split_photos
from rae_fast.errors import UserError


def _class_folder(folder, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{number:03d}.JPG", "JPEG")


def test_every_eighth_image_of_a_class_is_held_out(tmp_path) -> None:
    for name in ("cat", "dog"):
        _class_folder(tmp_path / "photos" / name, 20)
    _class_folder(tmp_path / "photos" / "dog" / "more", 4)
    assert split_photos(tmp_path / "photos", tmp_path / "data") == (2, 44)
    train, val = tmp_path / "data/train", tmp_path / "data/val"
    assert len(list((val / "cat").iterdir())) == -(-20 // HOLD_OUT_EVERY)
    both = {p.resolve() for split in (train, val) for p in split.glob("*/*")}
    assert len(both) == 44
    assert not {p.name for p in (train / "cat").iterdir()} & {p.name for p in (val / "cat").iterdir()}


def test_splitting_again_forgets_images_that_are_gone(tmp_path) -> None:
    for name in ("cat", "dog"):
        _class_folder(tmp_path / "photos" / name, 20)
    split_photos(tmp_path / "photos", tmp_path / "data")
    (tmp_path / "photos/cat/000.JPG").unlink()
    assert split_photos(tmp_path / "photos", tmp_path / "data") == (2, 39)
    assert all(link.exists() for link in (tmp_path / "data").glob("*/*/*"))


@pytest.mark.parametrize(
    ("classes", "said"),
    [({}, "is not a folder"), ({"cat": 20}, "holds 1 class folders"), ({"cat": 20, "dog": 3}, "dog holds 3 images")],
)
def test_unusable_folders_are_one_line(tmp_path, classes: dict[str, int], said: str) -> None:
    for name, count in classes.items():
        _class_folder(tmp_path / "photos" / name, count)
    with pytest.raises(UserError, match=said):
        split_photos(tmp_path / "photos", tmp_path / "data")
