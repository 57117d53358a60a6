"""Which classes are drawn: by number or name, in turn, so many of each, or equally and at random over all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rae_fast.config import Config
from rae_fast.errors import UserError, nearest
from rae_fast.evaluation.labels import draw_labels

DEFAULT_COUNT = 64
IMAGENET_CLASSES = 1000
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class LabelRequest:
    """What the command line says of labels.

    Attributes:
        classes: numbers or names, taken in turn; None is all of them.
        count: images in all; None is one of each of `classes`, or 64.
        per_class: so many of each class, one class after the other, instead of `count`.
        sampling: equal or random over all classes, instead of `classes`.
    """

    classes: tuple[str, ...] | None = None
    count: int | None = None
    per_class: int | None = None
    sampling: str | None = None


def choose_labels(request: LabelRequest, names: Sequence[Sequence[str]], num_classes: int, seed: int) -> np.ndarray:
    """Labels int64 [n] of samples 0, 1, ...

    Args:
        request: what was asked for.
        names: lists of class names, each by number; see `known_names`.
        num_classes: number of classes.
        seed: decides the order of equal and random labels.

    Raises:
        UserError: an unknown class, a number of images below 1, or wishes that exclude one another.
    """
    for flag, value in (("--count", request.count), ("--per-class", request.per_class)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}", "a number above 0")
    if request.sampling and (request.classes or request.per_class):
        raise UserError("--label-sampling together with --classes or --per-class", "one of them")
    if request.per_class and request.count:
        raise UserError("--count together with --per-class", "one of the two")
    if request.sampling:
        return draw_labels(request.sampling, request.count or DEFAULT_COUNT, num_classes, seed)
    numbers = list(range(num_classes))
    if request.classes is not None:
        numbers = class_numbers(request.classes, names, num_classes)
    if request.per_class:
        return np.repeat(np.asarray(numbers, np.int64), request.per_class)
    default = DEFAULT_COUNT if request.classes is None else len(numbers)
    return np.resize(np.asarray(numbers, np.int64), request.count or default)


def class_numbers(wanted: Sequence[str], names: Sequence[Sequence[str]], num_classes: int) -> list[int]:
    """Class numbers for numbers or names; case does not matter.

    Raises:
        UserError: not a number below `num_classes`, and not the name of exactly one class.
    """
    numbers = []
    for name in (word.strip() for word in wanted):
        found = sorted({i for table in names for i, known in enumerate(table) if known.casefold() == name.casefold()})
        if len(found) > 1:
            raise UserError(f"class {name!r} is the name of {found}", "one class", "give its number")
        if found:
            numbers.append(found[0])
        elif name.isdigit() and int(name) < num_classes:
            numbers.append(int(name))
        else:
            known = [word for table in names for word in table]
            shown = ", ".join(known[:10]) or "no class names are known here"
            raise UserError(
                f"class {name!r}{nearest(name, known)}", f"a number below {num_classes} or a name ({shown})"
            )
    return numbers


def known_names(config: Config, num_classes: int) -> list[tuple[str, ...]]:
    """Names of the classes: the store's, and ImageNet's in English where the classes are ImageNet's."""
    stored = _stored_names(config)
    tables = [stored] if stored else []
    # Sorted by WordNet id, as class folders are, ImageNet's classes have their usual numbers.
    if num_classes == IMAGENET_CLASSES and all(WORDNET_ID.fullmatch(name) for name in stored):
        from torchvision.models import ResNet18_Weights

        tables.append(tuple(ResNet18_Weights.DEFAULT.meta["categories"]))
    return tables


def _stored_names(config: Config) -> tuple[str, ...]:
    from rae_fast.latents.store import open_store

    if config.cache.path is None or not Path(config.cache.path).exists():
        return ()
    return tuple(open_store(config.cache.path, allow_incomplete=True).class_names)
