"""Labels from what the command line says."""

from __future__ import annotations

import numpy as np
import pytest

from rae_fast.errors import UserError
from rae_fast.evaluation.labels import random_labels
from rae_fast.sampling.classes import LabelRequest, choose_labels, class_numbers

NAMES = [("cross", "ring", "Star"), ("a cross", "a ring", "a star")]


def labels(**wishes: object) -> list[int]:
    return choose_labels(LabelRequest(**wishes), NAMES, 3, seed=0).tolist()


def test_classes_by_number_and_by_name() -> None:
    assert class_numbers(["ring", "0", " star", "a ring"], NAMES, 3) == [1, 0, 2, 1]
    for wrong, message in (("3", "class '3'"), ("rng", "did you mean 'ring'"), ("-1", "class '-1'"), ("", "class ''")):
        with pytest.raises(UserError, match=message):
            class_numbers([wrong], NAMES, 3)
    with pytest.raises(UserError, match="give its number"):
        class_numbers(["crane"], [("crane", "crane")], 2)


def test_counts() -> None:
    assert labels(count=5) == [0, 1, 2, 0, 1]
    assert len(labels()) == 64
    assert labels(classes=("ring", "star")) == [1, 2]
    assert labels(classes=("ring", "star"), count=3) == [1, 2, 1]
    assert labels(classes=("star", "cross"), per_class=2) == [2, 2, 0, 0]
    assert labels(per_class=2) == [0, 0, 1, 1, 2, 2]


def test_equal_and_random_labels() -> None:
    assert np.bincount(labels(sampling="equal", count=30)).tolist() == [10, 10, 10]
    assert labels(sampling="equal", count=30) != sorted(labels(sampling="equal", count=30))
    assert len(set(labels(sampling="random", count=30))) == 3


def test_random_label_i_depends_on_the_seed_and_i_alone() -> None:
    many = random_labels(1000, 10, 5)
    assert np.array_equal(random_labels(37, 10, 5), many[:37])
    assert not np.array_equal(random_labels(1000, 10, 6), many)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"count": 0}, "--count 0"),
        ({"per_class": -1}, "--per-class -1"),
        ({"classes": ("0",), "sampling": "equal"}, "--label-sampling together"),
        ({"count": 3, "per_class": 1}, "--count together with --per-class"),
        ({"sampling": "equal", "count": 31}, "divisible by num_classes"),
        ({"sampling": "eqal", "count": 30}, "did you mean 'equal'"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(wishes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels(**wishes)
