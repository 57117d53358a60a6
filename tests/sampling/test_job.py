"""Sets of images in a folder: the same bytes however the work is divided, continued, archived and refused."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.evaluation.images import to_uint8
from rae_fast.provenance import read_json
from rae_fast.runtime import Ranks
from rae_fast.sampling import EXACT_BATCH
from rae_fast.sampling.job import SamplingJob, image_path, run_sampling

LABELS = np.arange(EXACT_BATCH * 2 + 5) % 3


def bytes_of(folder: Path, count: int = len(LABELS)) -> list[bytes]:
    return [image_path(folder, i).read_bytes() for i in range(count)]


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples on one rank; read only."""
    folder = tmp_path_factory.mktemp("whole")
    run_sampling(config, SamplingJob(folder, LABELS), Ranks())
    return folder


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_the_same_bytes_for_any_batch(config: Config, whole: Path, tmp_path: Path, batch: int) -> None:
    run_sampling(config, SamplingJob(tmp_path / "run", LABELS, batch=batch), Ranks())
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_ranks_meet_in_the_folder_alone(config: Config, whole: Path, tmp_path: Path) -> None:
    """Rank 0 draws what the others have not drawn after a while, and finds what they have."""
    job = SamplingJob(tmp_path / "run", LABELS, npz=True, stall_s=0.0)
    run_sampling(config, job, Ranks(0, 0, 3))
    assert bytes_of(job.folder) == bytes_of(whole)
    before = image_path(job.folder, EXACT_BATCH).stat().st_mtime_ns
    run_sampling(config, job, Ranks(1, 1, 3))  # a rank that comes late finds nothing to do
    assert image_path(job.folder, EXACT_BATCH).stat().st_mtime_ns == before


def test_a_sample_does_not_depend_on_how_many_are_drawn(config: Config, whole: Path, tmp_path: Path) -> None:
    run_sampling(config, SamplingJob(tmp_path / "few", LABELS[:7]), Ranks())
    assert bytes_of(tmp_path / "few", 7) == bytes_of(whole, 7)


def test_samples_differ_by_index_and_by_seed(config: Config, tmp_path: Path) -> None:
    same_class = np.zeros(4, np.int64)
    run_sampling(config, SamplingJob(tmp_path / "a", same_class, seed=0), Ranks())
    run_sampling(config, SamplingJob(tmp_path / "b", same_class, seed=1), Ranks())
    assert len(set(bytes_of(tmp_path / "a", 4) + bytes_of(tmp_path / "b", 4))) == 8


def test_an_interrupted_run_goes_on_and_draws_only_what_is_missing(config: Config, whole: Path, tmp_path: Path) -> None:
    job = SamplingJob(tmp_path / "run", LABELS, npz=True)
    run_sampling(config, job, Ranks())
    image_path(job.folder, EXACT_BATCH + 3).unlink()
    untouched = image_path(job.folder, 0).stat().st_mtime_ns
    run_sampling(config, job, Ranks())
    assert bytes_of(job.folder) == bytes_of(whole)
    assert image_path(job.folder, 0).stat().st_mtime_ns == untouched


def test_a_larger_count_adds_to_what_is_there(config: Config, whole: Path, tmp_path: Path) -> None:
    job = SamplingJob(tmp_path / "run", LABELS[:EXACT_BATCH])
    run_sampling(config, job, Ranks())
    untouched = image_path(job.folder, 0).stat().st_mtime_ns
    run_sampling(config, replace(job, labels=LABELS), Ranks())
    assert bytes_of(job.folder) == bytes_of(whole)
    assert image_path(job.folder, 0).stat().st_mtime_ns == untouched
    assert np.array_equal(np.load(job.folder / "labels.npy"), LABELS)
    with pytest.raises(UserError, match="not the first of these"):
        run_sampling(config, job, Ranks())


def test_archive_and_grid_hold_the_images(config: Config, tmp_path: Path) -> None:
    run_sampling(config, SamplingJob(tmp_path / "run", LABELS, npz=True, columns=3), Ranks())
    archive = np.load(tmp_path / "run/samples.npz")
    assert np.array_equal(archive["labels"], LABELS)
    with Image.open(image_path(tmp_path / "run", 3)) as image:
        assert np.array_equal(np.asarray(image), archive["arr_0"][3])
    with Image.open(tmp_path / "run/grid.png") as grid:
        assert grid.width == 3 * 16 + 2 * 2


def test_the_archive_has_the_layout_that_adm_s_evaluator_streams(config: Config, tmp_path: Path) -> None:
    """It opens the member arr_0.npy of the zip, reads the header by its version, then raw bytes in C order."""
    run_sampling(config, SamplingJob(tmp_path / "run", LABELS[:5], npz=True), Ranks())
    with zipfile.ZipFile(tmp_path / "run/samples.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran, dtype) == ((5, 16, 16, 3), False, np.dtype("uint8"))
        rows = np.frombuffer(member.read(), np.uint8).reshape(shape)
    for i, row in enumerate(rows):
        with Image.open(image_path(tmp_path / "run", i)) as image:
            assert np.array_equal(np.asarray(image), row)


@pytest.mark.parametrize("layout", ["npy", "zarr"])
def test_kept_latents_decode_to_the_images(config: Config, whole: Path, tmp_path: Path, layout: str) -> None:
    import zarr

    job = SamplingJob(tmp_path / "run", LABELS, latents=layout, stall_s=0.0)
    run_sampling(config, job, Ranks(0, 0, 2))
    path = job.folder / f"latents.{layout}"
    latents = np.load(path) if layout == "npy" else zarr.open_array(str(path), mode="r")[:]
    assert (latents.shape, latents.dtype) == ((len(LABELS), 16, 4, 4), np.float32)
    rae = build_rae(config.stage_1, need_encoder=False).eval()
    with torch.no_grad():
        decoded = to_uint8(rae.decode(torch.from_numpy(latents[:EXACT_BATCH])))
    for i, image in enumerate(decoded):
        with Image.open(image_path(whole, i)) as kept:
            assert np.array_equal(np.asarray(kept), image)


@pytest.mark.parametrize("change", ["seed", "labels", "steps", "rows", "latents", "decoder"])
def test_a_folder_of_other_samples_is_refused(config: Config, tmp_path: Path, change: str) -> None:
    job = SamplingJob(tmp_path / "run", LABELS[:5])
    run_sampling(config, job, Ranks())
    before = bytes_of(tmp_path / "run", 5)
    params = replace(config.sampler.params, num_steps=5)
    changed: dict[str, Any] = {"seed": 1, "labels": LABELS[1:6], "rows": 8, "latents": "npy"}
    if change in changed:
        job = replace(job, **{change: changed[change]})
    elif change == "steps":
        config = replace(config, sampler=replace(config.sampler, params=params))
    else:
        weights = torch.load(config.stage_1.params.pretrained_decoder_path)
        weights["decoder_pred.bias"] += 1
        torch.save(weights, tmp_path / "decoder.pt")
        stage_1 = replace(config.stage_1.params, pretrained_decoder_path=str(tmp_path / "decoder.pt"))
        config = replace(config, stage_1=replace(config.stage_1, params=stage_1))
    with pytest.raises(UserError, match=r"was begun with|holds 5 samples whose labels"):
        run_sampling(config, job, Ranks())
    assert bytes_of(tmp_path / "run", 5) == before


def test_the_manifest_says_what_the_images_came_from(config: Config, whole: Path) -> None:
    manifest = read_json(whole / "sampling.json")
    assert manifest["samples"] == len(LABELS) and len(manifest["checkpoint_sha256"]) == 64
    assert load_config_text(manifest["config"]) == config


def load_config_text(text: str) -> Config:
    import yaml

    return load_config(yaml.safe_load(text))


@pytest.mark.parametrize("mode", ["SDE", "autoguidance"])
def test_stochastic_and_guided_samples_do_not_depend_on_the_batch_either(
    model_files: Path, settings: list[str], tmp_path: Path, mode: str
) -> None:
    guide = [f"guidance.guidance_model={{target: DiTDH, ckpt: {model_files / 'guide.pt'}, params: {{"]
    guide[0] += "hidden_size: [32, 32], depth: [2, 1], num_heads: [2, 2], class_dropout_prob: 0.1}}"
    chosen = ["sampler.mode=SDE"] if mode == "SDE" else ["guidance.method=autoguidance", *guide]
    config = load_config(None, [*settings, *chosen])
    run_sampling(config, SamplingJob(tmp_path / "many", LABELS), Ranks())
    run_sampling(config, SamplingJob(tmp_path / "few", LABELS[:3]), Ranks())
    assert bytes_of(tmp_path / "few", 3) == bytes_of(tmp_path / "many", 3)


def test_labels_outside_of_the_model_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="label 3"):
        run_sampling(config, SamplingJob(tmp_path / "run", np.array([3])), Ranks())


@pytest.mark.parametrize(("change", "message"), [({"batch": 0}, "--batch 0"), ({"seed": -1}, "--seed -1")])
def test_unusable_numbers_are_refused(config: Config, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_sampling(config, SamplingJob(tmp_path / "run", LABELS[:1], **change), Ranks())
