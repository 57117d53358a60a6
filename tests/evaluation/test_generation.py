"""The generation report: twice the same, the same on two ranks, and right where the answer is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.frechet import frechet_distance
from rae_fast.evaluation.generation import GenerationJob, evaluate_generation, inception_score
from rae_fast.evaluation.images import save_png
from rae_fast.provenance import read_json, write_json
from rae_fast.runtime import Ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tiny_features: str, pack: Callable[..., str], tmp_path: Path) -> GenerationJob:
    return GenerationJob(
        pack("samples.npz", 300, 1), pack("reference.npz", 280, 2), (tiny_features,), tmp_path / "out", tmp_path / "c"
    )


def without_run(report: dict) -> dict:
    return {key: value for key, value in report.items() if key != "run"}


def test_all_figures_are_reported_and_twice_the_same(job: GenerationJob, tmp_path: Path) -> None:
    first = evaluate_generation(job, None, Ranks())
    assert first is not None
    figures = first["metrics"][job.features[0]]
    names = {"fd", "sfd", "inception_score", "inception_score_std", "mmd2", "precision", "recall"}
    assert set(figures) == names and all(np.isfinite(value) for value in figures.values())
    assert read_json(job.out / "report.json") == json.loads(json.dumps(first))
    again = evaluate_generation(job, None, Ranks())
    anew = evaluate_generation(replace(job, cache=tmp_path / "other", out=tmp_path / "third"), None, Ranks())
    assert without_run(first) == without_run(again) == without_run(anew)
    page = (job.out / "report.html").read_text()
    assert "inception score" in page and first["samples"]["sha256"] in page
    assert (job.out / "samples.png").exists() and (job.out / "reference.png").exists()


def test_figures_are_those_of_the_features(job: GenerationJob) -> None:
    import torch
    from tiny_features import TinyNetwork

    report = evaluate_generation(job, None, Ranks())
    network, moments = TinyNetwork().eval(), []
    for source in (job.samples, job.reference):
        x = torch.from_numpy(np.load(source)["arr_0"]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            features = network(x)["features"].double().numpy()
        moments.append((features.mean(0), np.cov(features, rowvar=False)))
    assert report["metrics"][job.features[0]]["fd"] == pytest.approx(
        frechet_distance(*moments[0], *moments[1]), rel=1e-4
    )


def test_a_set_compared_with_itself_differs_in_nothing(job: GenerationJob) -> None:
    figures = evaluate_generation(replace(job, reference=job.samples), None, Ranks())["metrics"][job.features[0]]
    assert figures["fd"] == pytest.approx(0, abs=1e-9) and figures["sfd"] == pytest.approx(0, abs=1e-9)
    assert (figures["precision"], figures["recall"]) == (1, 1)
    assert figures["mmd2"] < 0, "unbiased, so below zero for twins"


def test_a_folder_of_png_gives_the_report_of_the_npz(job: GenerationJob, tmp_path: Path) -> None:
    for i, image in enumerate(np.load(job.samples)["arr_0"]):
        save_png(tmp_path / f"set/images/{i:06d}.png", image)
    manifest = {"checkpoint": "a.pt", "checkpoint_sha256": "abc", "seed": 3, "config": "long"}
    write_json(tmp_path / "set/sampling.json", manifest)
    packed = evaluate_generation(job, None, Ranks())
    loose = evaluate_generation(replace(job, samples=str(tmp_path / "set")), None, Ranks())
    assert loose["metrics"] == packed["metrics"]
    assert loose["samples"]["sha256"] == packed["samples"]["sha256"]
    assert loose["made_by"] == {"checkpoint": "a.pt", "checkpoint_sha256": "abc", "seed": 3}


def test_two_ranks_write_the_report_of_one(job: GenerationJob, tmp_path: Path) -> None:
    one = evaluate_generation(job, None, Ranks())
    command = [sys.executable, str(ROOT / "tools/evaluate.py"), "generation", "--features", job.features[0]]
    command += ["--samples", job.samples, "--reference", job.reference]
    command += ["--out", str(tmp_path / "two"), "--cache", str(tmp_path / "cache of two")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.DEVNULL) for rank in (0, 1)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    two = read_json(tmp_path / "two/report.json")
    assert (one["run"]["ranks"], two["run"]["ranks"]) == (1, 2)
    assert without_run(one) == without_run(two)


def test_adm_s_statistics_serve_as_reference(job: GenerationJob, tmp_path: Path) -> None:
    whole = evaluate_generation(job, None, Ranks())["metrics"][job.features[0]]
    (cached,) = [path.parent for path in job.cache.rglob("moments-spatial.npz") if "280" in _count(path)]
    arrays = {}
    for name, (mean, covariance) in {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
        with np.load(cached / f"moments-{name}.npz") as file:
            arrays |= {mean: file["mean"], covariance: file["covariance"]}
    np.savez(tmp_path / "virtual.npz", **arrays)
    report = evaluate_generation(replace(job, reference=str(tmp_path / "virtual.npz")), None, Ranks())
    figures = report["metrics"][job.features[0]]
    assert {name: figures[name] for name in ("fd", "sfd")} == {name: whole[name] for name in ("fd", "sfd")}
    assert "precision" not in figures and report["reference"]["statistics_sha256"]


def _count(path: Path) -> str:
    blocks = [np.load(block)["features"] for block in path.parent.glob("block-*.npz")]
    return str(sum(map(len, blocks)))


def test_statistics_of_another_extractor_are_refused(job: GenerationJob, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(UserError, match="same feature extractor"):
        evaluate_generation(replace(job, reference=str(tmp_path / "other.npz")), None, Ranks())
    np.savez(tmp_path / "torn.npz", mu=np.zeros(9), sigma=np.eye(3))
    with pytest.raises(UserError, match="sigma"):
        evaluate_generation(replace(job, reference=str(tmp_path / "torn.npz")), None, Ranks())


def test_a_store_is_its_own_reference_by_its_latents_and_names_the_encoder(
    cache_config: Callable[..., Config], pristine_store: Path, balanced_store: Path, tmp_path: Path
) -> None:
    for store in (pristine_store, balanced_store):  # with and without pixels
        job = GenerationJob(str(pristine_store), str(store), ("encoder",), tmp_path / store.name, tmp_path / "cache")
        report = evaluate_generation(job, None, Ranks())
        figures = report["metrics"]["encoder"]
        assert figures["fd"] < 1e-3 and figures["precision"] == figures["recall"] == 1
        assert report["reference"]["latents_sha256"] and report["evaluators"]["encoder"]["precision"] == "fp32"
    with pytest.raises(UserError, match="no encoder is named"):
        evaluate_generation(replace(job, reference=_packed(pristine_store, tmp_path)), None, Ranks())


def _packed(store: Path, folder: Path) -> str:
    from rae_fast.evaluation.image_sets import open_images
    from rae_fast.evaluation.images import save_npz

    pixels = open_images(store)
    save_npz(folder / "packed.npz", pixels.pieces(0, pixels.count), count=pixels.count)
    return str(folder / "packed.npz")


def test_inception_score_of_certain_and_of_uncertain_logits() -> None:
    certain = 1000 * np.eye(8, dtype=np.float32)[np.arange(800) % 8]
    assert inception_score(certain)[0] == pytest.approx(8, rel=0.05)
    assert inception_score(np.zeros((800, 8), np.float32)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_the_tool_names_missing_weights_in_one_line(job: GenerationJob, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/evaluate.py"), "generation", "--samples", job.samples]
    command += ["--reference", job.reference, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(
        command, env={**os.environ, "TORCH_HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path / "hub/checkpoints") in done.stderr
    assert not (tmp_path / "out").exists()
