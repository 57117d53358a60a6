"""Frechet distance against closed forms, moments against numpy, PSNR, SSIM and labels against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rae_fast.errors import UserError
from rae_fast.evaluation.frechet import StreamingMoments, frechet_distance
from rae_fast.evaluation.labels import draw_labels, equal_labels
from rae_fast.evaluation.reconstruction import psnr, ssim


def spread(rng: np.random.Generator, dim: int, rank: int) -> np.ndarray:
    factor = rng.standard_normal((dim, rank))
    return factor @ factor.T / rank


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    a, b = rng.uniform(0, 3, 20), rng.uniform(0, 3, 20)
    mu1, mu2 = rng.standard_normal(20), rng.standard_normal(20)
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    found = frechet_distance(mu1, (basis * a) @ basis.T, mu2, (basis * b) @ basis.T)
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_one_dimension_is_the_closed_form() -> None:
    found = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-1.0]), np.array([[9.0]]))
    assert found == pytest.approx(4 + (2 - 3) ** 2)


def test_frechet_distance_is_symmetric_and_zero_for_singular_twins() -> None:
    rng = np.random.default_rng(1)
    mu, singular, full = np.zeros(30), spread(rng, 30, 5), spread(rng, 30, 60)
    assert frechet_distance(mu, singular, mu, singular) == pytest.approx(0, abs=1e-7)
    assert frechet_distance(mu, singular, mu, full) == pytest.approx(frechet_distance(mu, full, mu, singular))
    assert frechet_distance(mu, singular, mu, full) > 0


def test_frechet_distance_of_different_extractors_is_refused() -> None:
    with pytest.raises(UserError, match="same feature extractor"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_moments_of_a_stream_are_those_of_numpy_however_it_is_cut() -> None:
    features = np.random.default_rng(2).standard_normal((50, 6)) + 100
    for pieces in (1, 7, 50):
        parts = [StreamingMoments(6) for _ in range(2)]
        for i, part in enumerate(np.array_split(features, pieces)):
            parts[i % 2].update(torch.from_numpy(part))
        parts[0].merge(StreamingMoments.from_state(parts[1].state()))
        mean, covariance = parts[0].finish()
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


def test_useless_features_are_refused() -> None:
    moments = StreamingMoments(3)
    with pytest.raises(UserError, match="two or more"):
        moments.finish()
    with pytest.raises(UserError, match="not finite"):
        moments.update(np.array([[1.0, 2.0, np.nan]]))
    with pytest.raises(UserError, match="shape"):
        moments.update(np.zeros((2, 4)))


def test_psnr_of_a_known_error_and_of_none() -> None:
    original = torch.full((2, 3, 16, 16), 0.5)
    restored = original.clone()
    restored[0] += 0.1
    assert psnr(restored, original).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


def test_ssim_is_one_for_twins_and_low_for_strangers_and_per_image() -> None:
    images = torch.rand(70, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    found = ssim(torch.cat([images[:69], images[:1]]), images)
    assert found.shape == (70,)
    torch.testing.assert_close(found[:69], torch.ones(69))
    assert found[69] < 0.3


def test_eight_bit_and_float_images_measure_alike() -> None:
    a, b = torch.randint(0, 256, (2, 4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(psnr(a, b), psnr(a / 255, b / 255))
    torch.testing.assert_close(ssim(a, b), ssim(a / 255, b / 255))


def test_pairs_of_different_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="pairs of the same size"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 17, 16))


def test_equal_labels_hold_every_class_equally_often_in_a_mixed_order() -> None:
    labels = draw_labels("equal", 300, 10, seed=5)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [30] * 10
    assert not np.array_equal(labels, np.sort(labels))
    np.testing.assert_array_equal(labels, equal_labels(300, 10, 5))
    assert not np.array_equal(labels, equal_labels(300, 10, 6))


def test_random_labels_depend_on_the_seed_alone() -> None:
    labels = draw_labels("random", 1000, 7, seed=1)
    np.testing.assert_array_equal(labels, draw_labels("random", 1000, 7, seed=1))
    assert set(labels) == set(range(7))
    with pytest.raises(UserError, match="did you mean 'equal'"):
        draw_labels("equl", 10, 2, 0)
