"""Metrics, eight-bit conversion and label order against the reference (golden README, section 7)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_fast.errors import UserError
from rae_fast.evaluation.frechet import StreamingMoments, frechet_distance
from rae_fast.evaluation.images import save_npz, to_uint8
from rae_fast.evaluation.labels import equal_labels, reference_labels
from rae_fast.evaluation.pairs import ReconstructionJob, evaluate_reconstruction
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.runtime import Ranks

FID_GATE, SINGULAR_FID_GATE = 1e-6, 1e-4
PSNR_GATE, SSIM_GATE = 1e-4, 1e-5


@pytest.fixture
def metrics(golden_file: Callable[[str], Path]) -> np.lib.npyio.NpzFile:
    return np.load(golden_file("eval/metrics.npz"))


@pytest.fixture
def sampler(golden_file: Callable[[str], Path]) -> dict:
    return json.loads(golden_file("eval/label_sampler.json").read_text())


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gathered = StreamingMoments(features.shape[1])
    for part in np.array_split(features, 3):
        gathered.update(part)
    return gathered.finish()


def test_frechet_distance_is_the_reference_s(metrics: np.lib.npyio.NpzFile) -> None:
    first, second, few = (moments(metrics[f"fid/feats{name}"]) for name in ("1", "2", "_few"))
    assert frechet_distance(*first, *second) == pytest.approx(float(metrics["fid/value"]), rel=FID_GATE)
    assert frechet_distance(*first, *first) == pytest.approx(float(metrics["fid/self"]), abs=1e-9)
    singular = pytest.approx(float(metrics["fid/value_few_vs_1"]), rel=SINGULAR_FID_GATE)
    assert frechet_distance(*few, *first) == singular
    assert frechet_distance(*first, *few) == singular


def test_psnr_and_ssim_are_the_reference_s(metrics: np.lib.npyio.NpzFile) -> None:
    original, restored = (torch.from_numpy(metrics[f"iqa/{name}"]).permute(0, 3, 1, 2) for name in ("ref", "rec"))
    decibels, similarity = psnr(restored, original), ssim(restored, original)
    np.testing.assert_allclose(decibels, metrics["iqa/psnr_per_image"], rtol=0, atol=PSNR_GATE)
    np.testing.assert_allclose(similarity, metrics["iqa/ssim_per_image"], rtol=0, atol=SSIM_GATE)
    for name in metrics.files:
        if re.fullmatch(r"iqa/psnr_bs\d+", name):
            assert decibels.mean().item() == pytest.approx(float(metrics[name]), abs=PSNR_GATE)
        if re.fullmatch(r"iqa/ssim_bs\d+", name):
            assert similarity.mean().item() == pytest.approx(float(metrics[name]), abs=SSIM_GATE)


def test_eight_bit_values_are_the_reference_s(metrics: np.lib.npyio.NpzFile) -> None:
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(metrics["uint8/x"])), metrics["uint8/y"])


def test_label_order_is_the_reference_s(sampler: dict) -> None:
    for case in sampler["cases"]:
        count, classes, seed = case["num_fid_samples"], case["num_classes"], case["seed"]
        by_rank = np.array(case["labels_rank_step"])
        ours = equal_labels(count, classes, seed, total=case["total_samples"])
        np.testing.assert_array_equal(ours, by_rank.reshape(-1))
        files = np.array(case["png_names_rank_step"]).reshape(-1)
        numbers = np.array([int(name.removesuffix(".png")) for name in files])
        by_file = reference_labels(count, classes, seed, world=case["world_size"], batch_size=case["per_proc_batch"])
        np.testing.assert_array_equal(by_file[numbers], by_rank.reshape(-1))


def test_indivisible_counts_are_refused_in_the_reference_s_words(sampler: dict) -> None:
    words = sampler["error_when_not_divisible"]
    count, classes = (int(number) for number in re.findall(r"\((\d+)\)", words))
    with pytest.raises(UserError) as caught:
        equal_labels(count, classes, 0)
    assert words in str(caught.value)


def test_the_reconstruction_tool_gives_the_reference_s_figures(metrics: np.lib.npyio.NpzFile, tmp_path: Path) -> None:
    for name in ("ref", "rec"):
        save_npz(tmp_path / f"{name}.npz", metrics[f"iqa/{name}"])
    job = ReconstructionJob(
        str(tmp_path / "ref.npz"), str(tmp_path / "rec.npz"), ("psnr", "ssim"), tmp_path / "out", tmp_path / "cache"
    )
    found = evaluate_reconstruction(job, None, Ranks())["metrics"]["pairs"]
    assert found["psnr_db"] == pytest.approx(metrics["iqa/psnr_per_image"].mean(), abs=PSNR_GATE)
    assert found["ssim"] == pytest.approx(metrics["iqa/ssim_per_image"].mean(), abs=SSIM_GATE)
