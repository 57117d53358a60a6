"""Precision, recall and MMD against their definitions, written out pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from rae_fast.errors import UserError
from rae_fast.evaluation import pairwise
from rae_fast.evaluation.mmd import squared_mmd
from rae_fast.evaluation.precision_recall import precision_recall


def clouds(n: int, m: int, dim: int = 6, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, dim)) + shift, rng.standard_normal((m, dim))


def by_definition(points: np.ndarray, centers: np.ndarray, k: int) -> float:
    inside = 0
    for point in points:
        covered = False
        for i, center in enumerate(centers):
            others = sorted(np.linalg.norm(center - other) for j, other in enumerate(centers) if j != i)
            covered = covered or np.linalg.norm(point - center) <= others[k - 1]
        inside += covered
    return inside / len(points)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_brute_force(chunk: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "CHUNK", chunk)
    samples, reference = clouds(31, 23)
    expected = by_definition(samples, reference, k), by_definition(reference, samples, k)
    assert precision_recall(samples, reference, neighbours=k) == expected
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


def test_a_collapsed_generator_is_precise_and_recalls_nothing() -> None:
    _, reference = clouds(1, 200)
    # On one of the references, so close together that their balls reach no other.
    collapsed = reference[:1] + 1e-6 * np.random.default_rng(1).standard_normal((50, 6))
    assert precision_recall(collapsed, reference) == (1.0, pytest.approx(1 / 200, abs=1 / 200))
    assert precision_recall(reference, reference) == (1.0, 1.0)
    assert precision_recall(reference + 100, reference) == (0.0, 0.0)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="3 samples"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(UserError, match="one extractor"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(UserError, match="two or more"):
        squared_mmd(np.zeros((1, 2)), np.zeros((9, 2)))
    with pytest.raises(UserError, match="one extractor"):
        squared_mmd(np.zeros((9, 2)), np.zeros((9, 3)))


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_mmd_is_that_of_its_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "CHUNK", chunk)
    x, y = clouds(11, 9, shift=0.3)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    within = [
        sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    between = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    assert squared_mmd(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_mmd_is_unbiased_and_sees_a_difference() -> None:
    rng = np.random.default_rng(3)
    same = [squared_mmd(rng.standard_normal((20, 4)), rng.standard_normal((20, 4))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0 < max(same)
    other = [squared_mmd(rng.standard_normal((20, 4)) + 1, rng.standard_normal((20, 4))) for _ in range(20)]
    assert np.mean(other) > 5 * np.std(same)
