from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rae_fast.demo.shape_classifier import ShapeClassifier, class_agreement, to_gray, train_classifier
from rae_fast.demo.shapes import CLASSES, draw_picture
from rae_fast.errors import UserError

SIDE = 32


def crops(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Centre crops uint8 [N, 3, S, S] of the demo's pictures and their class numbers."""
    images = []
    for index in range(count):
        picture = draw_picture(0, split, index)
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        crop = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        images.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(images), torch.arange(count) % len(CLASSES)


@pytest.fixture(scope="module")
def judged() -> tuple[ShapeClassifier, Tensor, Tensor]:
    """A classifier trained on the demo's training pictures, and held-out pictures with their labels."""
    torch.set_num_threads(1)
    classifier = train_classifier(*crops("train", 640), max_epochs=16)
    return classifier, *crops("val", 160)


def test_held_out_pictures_are_told_apart(judged: tuple[ShapeClassifier, Tensor, Tensor]) -> None:
    classifier, images, labels = judged
    assert class_agreement(classifier, images, labels) >= 0.95


def test_agreement_with_other_labels_is_low(judged: tuple[ShapeClassifier, Tensor, Tensor]) -> None:
    classifier, images, labels = judged
    assert class_agreement(classifier, images, (labels + 1) % len(CLASSES)) < 0.05


def test_noise_is_not_taken_for_the_shapes_asked_for(judged: tuple[ShapeClassifier, Tensor, Tensor]) -> None:
    classifier, images, labels = judged
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert class_agreement(classifier, noise, labels) < 0.3


def test_colour_is_not_seen(judged: tuple[ShapeClassifier, Tensor, Tensor]) -> None:
    classifier, images, _ = judged
    luma = (images.float() * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    drained = luma.round().to(torch.uint8).expand(-1, 3, -1, -1)
    assert not torch.equal(drained, images)
    assert torch.equal(classifier(to_gray(drained)).argmax(1), classifier(to_gray(images)).argmax(1))


def test_same_seed_gives_the_same_classifier_and_leaves_global_randomness_alone() -> None:
    images, labels = crops("train", 64)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_classifier(images, labels, max_epochs=2)
    assert torch.equal(torch.rand(3), expected)
    second = train_classifier(images, labels, max_epochs=2)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_flat_image_has_finite_logits() -> None:
    flat = torch.full((2, 3, SIDE, SIDE), 128, dtype=torch.uint8)
    assert torch.equal(to_gray(flat), torch.zeros(2, 1, SIDE, SIDE))


@pytest.mark.parametrize("side", [32, 48, 64, 96, 250])
def test_any_image_size_and_two_classes_of_few_images(side: int) -> None:
    images = torch.zeros(12, 3, side, side, dtype=torch.uint8)
    labels = torch.arange(12) % 2
    images[labels == 1, :, : side // 2] = 255
    classifier = train_classifier(images, labels, classes=2, max_epochs=3)
    assert classifier(to_gray(images)).shape == (12, 2)


def test_time_limit_ends_the_training() -> None:
    images, labels = crops("train", 64)
    start_s = time.monotonic()
    train_classifier(images, torch.randint(0, 8, labels.shape), max_epochs=10_000, max_seconds=0.5)
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize(("labels", "classes"), [([0, 0, 0, 0], None), ([0, 1, 2], None), ([0, 1, 0, 1], 5)])
def test_too_few_classes_or_images_are_refused(labels: list[int], classes: int | None) -> None:
    with pytest.raises(UserError, match="to train the shape classifier on"):
        train_classifier(torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8), torch.tensor(labels), classes=classes)
