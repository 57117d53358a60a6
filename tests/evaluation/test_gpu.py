"""On a GPU the figures are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rae_fast.evaluation.features import build_extractor, image_features
from rae_fast.evaluation.image_sets import open_images
from rae_fast.evaluation.mmd import squared_mmd
from rae_fast.evaluation.precision_recall import precision_recall

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_pairwise_figures_are_the_cpu_s() -> None:
    rng = np.random.default_rng(0)
    samples, reference = rng.standard_normal((3000, 64)) + 0.1, rng.standard_normal((2500, 64))
    assert precision_recall(samples, reference, device=GPU) == precision_recall(samples, reference)
    assert squared_mmd(samples, reference, device=GPU) == pytest.approx(squared_mmd(samples, reference), rel=1e-9)


def test_features_are_the_cpu_s_and_twice_the_same(tiny_features: str, pack: Callable[..., str]) -> None:
    images = open_images(pack("a.npz", 70, 0))
    found = [image_features(images, build_extractor(tiny_features, None, device)) for device in (CPU, GPU, GPU)]
    cpu, gpu, again = (figures.compute(0, 70)[1] for figures in found)
    for name, expected in cpu.items():
        np.testing.assert_allclose(gpu[name], expected, atol=2e-3)
        np.testing.assert_array_equal(gpu[name], again[name])
