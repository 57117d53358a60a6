"""The demo's judge: a small CNN, trained on grayscale real images, that says which class a picture shows.

It sees no colour, so that shape decides. `class_agreement` of generated pictures with the classes that were asked for
means something only next to the accuracy on real pictures that no training saw.

Shapes: N images, B of a batch, S pixels a side, K classes.
"""

from __future__ import annotations

import time
from itertools import pairwise
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_fast.errors import UserError

BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.02
SHIFT_FRACTION = 1 / 16
PATIENCE_EPOCHS, PATIENCE_STEPS = 3, 100
GOAL_ACCURACY = 0.995


class ShapeClassifier(nn.Module):
    """Four strided convolutions and a linear layer over what remains of the plane.

    Args:
        classes: number of classes.
        image_size: pixels a side.
        width: channels of the first convolution, doubled twice.
    """

    def __init__(self, classes: int, image_size: int, width: int = 16) -> None:
        super().__init__()
        self.classes, self.image_size = classes, image_size
        channels = (1, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * channels[-1], classes)
        )

    def forward(self, gray_B1SS: Tensor) -> Tensor:
        """Class logits [B, K] of `to_gray` images."""
        return self.head(self.features(gray_B1SS))


def to_gray(images_u8: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] to float [N, 1, S, S]: BT.601 luma, each image with mean 0 and deviation 1."""
    weights = torch.tensor((0.299, 0.587, 0.114), device=images_u8.device).reshape(1, 3, 1, 1)
    gray = (images_u8.float() * weights).sum(dim=1, keepdim=True)
    deviation, mean = torch.std_mean(gray, dim=(1, 2, 3), keepdim=True)
    return (gray - mean) / deviation.clamp_min(1.0)


def train_classifier(
    images_u8: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    seed: int = 0,
    max_epochs: int = 200,
    max_seconds: float = 30.0,
) -> ShapeClassifier:
    """Train on real images; an eighth of them is set aside to decide when to stop and which epoch to keep.

    Stops at 99.5 % on that eighth, after three epochs and a hundred steps without a gain, after `max_epochs` or
    `max_seconds`.

    Args:
        images_u8: uint8 [N, 3, S, S].
        labels: int64 [N].
        classes: how many; one more than the largest label where not given.

    Raises:
        UserError: fewer than two classes, or fewer than two images a class on average.
    """
    classes = classes or int(labels.max()) + 1
    if classes < 2 or len(labels) < 2 * classes:
        raise UserError(
            f"{len(labels)} images of {classes} class(es) to train the shape classifier on",
            "two classes or more with at least two images each",
            "add images",
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ShapeClassifier(classes, images_u8.shape[-1])
        model.to(images_u8.device)
        _fit(model, to_gray(images_u8), labels, generator, max_epochs, max_seconds)
    return model.eval()


def _fit(
    model: ShapeClassifier,
    gray_N1SS: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    max_epochs: int,
    max_seconds: float,
) -> None:
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    aside, train = order[: max(1, len(order) // 8)], order[max(1, len(order) // 8) :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    patience = max(PATIENCE_EPOCHS, ceil(PATIENCE_STEPS * BATCH / len(train)))
    start_s, best, best_state, since = time.monotonic(), -1.0, {}, 0
    for _ in range(max_epochs):
        _train_epoch(model, optimizer, gray_N1SS, labels, train, generator)
        accuracy = (_predict(model, gray_N1SS[aside]) == labels[aside]).float().mean().item()
        since += 1
        if accuracy > best:
            best, since = accuracy, 0
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        if best >= GOAL_ACCURACY or since >= patience or time.monotonic() - start_s > max_seconds:
            break
    model.load_state_dict(best_state)


def _train_epoch(
    model: ShapeClassifier,
    optimizer: torch.optim.Optimizer,
    gray_N1SS: Tensor,
    labels: Tensor,
    train: Tensor,
    generator: torch.Generator,
) -> None:
    model.train()
    shuffled = train[torch.randperm(len(train), generator=generator).to(train.device)]
    for index in shuffled.split(BATCH):
        logits_BK = model(_augment(gray_N1SS[index], generator))
        loss = F.cross_entropy(logits_BK, labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _augment(gray_B1SS: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the batch by up to a sixteenth of the side, swap dark and light, blur half of it a little."""
    reach = max(1, round(gray_B1SS.shape[-1] * SHIFT_FRACTION))
    shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(gray_B1SS, [reach] * 4, mode="replicate")
    size = gray_B1SS.shape[-1]
    moved = padded[..., reach + shift[0] : reach + shift[0] + size, reach + shift[1] : reach + shift[1] + size]
    sign = 1 - 2 * torch.randint(0, 2, (len(moved), 1, 1, 1), generator=generator).to(moved)
    half = len(moved) // 2
    soft = F.avg_pool2d(F.pad(moved[:half], [1] * 4, mode="replicate"), 3, stride=1)
    return sign * torch.cat([soft, moved[half:]])


@torch.no_grad()
def _predict(model: ShapeClassifier, gray_N1SS: Tensor) -> Tensor:
    """Class numbers int64 [N]."""
    model.eval()
    return torch.cat([model(batch).argmax(dim=1) for batch in gray_N1SS.split(4 * BATCH)])


def class_agreement(classifier: ShapeClassifier, images_u8: Tensor, labels: Tensor) -> float:
    """Share of uint8 [N, 3, S, S] images that the classifier puts into the class `labels` int64 [N] says."""
    return (_predict(classifier, to_gray(images_u8)) == labels).float().mean().item()
