"""The user's own ImageFolder split for the demo: every eighth image of a class is held out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rae_fast.errors import UserError
from rae_fast.images.folders import IMAGENET_EXTENSIONS

HOLD_OUT_EVERY = 8
LEAST_IMAGES = 16


def split_photos(source: Path, folder: Path) -> tuple[int, int]:
    """Link the images of `source` (class folders) into `folder`/train and `folder`/val.

    Returns:
        Numbers of classes and of images.

    Raises:
        UserError: `source` is missing, has fewer than two class folders, or a class has too few images.
    """
    if not source.is_dir():
        raise UserError(f"DATA={source} is not a folder", "a folder with one folder of images for each class")
    classes = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise UserError(
            f"DATA={source} holds {len(classes)} class folders",
            "two or more, each with its images",
            "make one folder for each kind of image",
        )
    shutil.rmtree(folder, ignore_errors=True)
    total = 0
    for class_folder in classes:
        images = _images_below(class_folder)
        if len(images) < LEAST_IMAGES:
            raise UserError(
                f"class folder {class_folder} holds {len(images)} images",
                f"at least {LEAST_IMAGES}",
                "add images or remove the folder",
            )
        total += len(images)
        for number, image in enumerate(images):
            split = "val" if number % HOLD_OUT_EVERY == 0 else "train"
            target = folder / split / class_folder.name / "_".join(image.relative_to(class_folder).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(image.resolve())
    return len(classes), total


def _images_below(folder: Path) -> list[Path]:
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [Path(parent) / name for name in names if name.lower().endswith(IMAGENET_EXTENSIONS)]
    return sorted(found)
