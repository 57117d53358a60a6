"""Reconstructions in a folder: what they are of, the same bytes on any number of ranks, and images that fail."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.images import to_uint8
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.images.crop import center_crop_pil
from rae_fast.runtime import Ranks
from rae_fast.sampling.reconstruct import ReconstructionJob, run_reconstruction
from rae_fast.sampling.source import open_decoder_source

ROWS = 3  # small, so that seven photos make three units


@pytest.fixture
def photos(model_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_files / "photos", tmp_path / "photos"))


def job_of(source: Path | str, folder: Path, **options: object) -> ReconstructionJob:
    return ReconstructionJob((str(source),), folder, **{"rows": ROWS, "stall_s": 0.0, **options})


def image(folder: Path, i: int) -> np.ndarray:
    with Image.open(folder / f"{i:06d}.png") as opened:
        return np.asarray(opened)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "reconstruction.json"
    }


def test_pairs_and_figures_are_the_autoencoder_s(config: Config, photos: Path, tmp_path: Path) -> None:
    metrics = run_reconstruction(config, job_of(photos, tmp_path / "out", npz=True), Ranks())
    rae, originals = build_rae(config.stage_1).eval(), []
    for i, path in enumerate(sorted(photos.glob("*/*"))):
        with Image.open(path) as opened:
            originals.append(np.asarray(center_crop_pil(opened.convert("RGB"), 16)))
        assert np.array_equal(image(tmp_path / "out/originals", i), originals[-1])
    batch = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2)
    with torch.no_grad():
        restored = to_uint8(rae(batch.float() / 255)).astype(int)
    kept = np.stack([image(tmp_path / "out/reconstructions", i) for i in range(7)])
    assert np.abs(restored - kept).max() <= 1
    again = torch.from_numpy(kept).permute(0, 3, 1, 2)
    assert metrics["psnr_db"] == pytest.approx(psnr(again, batch).mean().item(), abs=1e-6)
    assert metrics["ssim"] == pytest.approx(ssim(again, batch).mean().item(), abs=1e-5)
    assert metrics["images"] == 7 and metrics["failed"] == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    packed = np.load(tmp_path / "out/reconstructions.npz")
    assert np.array_equal(packed["arr_0"], kept) and packed["labels"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert np.array_equal(np.load(tmp_path / "out/originals.npz")["arr_0"], np.stack(originals))
    with Image.open(tmp_path / "out/pairs.png") as pairs:
        assert pairs.size == (7 * 18 - 2, 2 * 18 - 2)


def test_any_number_of_ranks_writes_the_same_files(config: Config, photos: Path, tmp_path: Path) -> None:
    run_reconstruction(config, job_of(photos, tmp_path / "one"), Ranks())
    run_reconstruction(config, job_of(photos, tmp_path / "two"), Ranks(0, 0, 2))  # does the absent rank's share too
    assert run_reconstruction(config, job_of(photos, tmp_path / "two"), Ranks(1, 1, 2)) is None
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_interrupted_run_makes_only_what_is_missing(config: Config, photos: Path, tmp_path: Path) -> None:
    job = job_of(photos, tmp_path / "out")
    run_reconstruction(config, job, Ranks())
    whole, untouched = files(job.folder), (job.folder / "originals/000000.png").stat().st_mtime_ns
    (job.folder / "figures/000003.json").unlink()
    (job.folder / "reconstructions/000004.png").unlink()
    run_reconstruction(config, job, Ranks())
    assert files(job.folder) == whole
    assert (job.folder / "originals/000000.png").stat().st_mtime_ns == untouched


def test_an_image_that_cannot_be_read_is_named_and_tried_again(config: Config, photos: Path, tmp_path: Path) -> None:
    broken = sorted(photos.glob("*/*"))[4]
    sound = broken.read_bytes()
    broken.write_bytes(b"x" * len(sound))
    job = job_of(photos, tmp_path / "out", npz=True)
    metrics = run_reconstruction(config, job, Ranks())
    assert (metrics["images"], metrics["failed"]) == (6, 1)
    with (job.folder / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["failed"]) for row in rows] == [False] * 4 + [True] + [False] * 2
    assert not (job.folder / "reconstructions/000004.png").exists()
    assert len(np.load(job.folder / "originals.npz")["labels"]) == 6
    broken.write_bytes(sound)
    age(job.folder)
    assert run_reconstruction(config, job, Ranks())["failed"] == 0
    assert len(list((job.folder / "reconstructions").iterdir())) == 7


def age(folder: Path) -> None:
    """As if an earlier process had written the figures."""
    import os

    for path in (folder / "figures").iterdir():
        os.utime(path, (1, 1))


def test_one_image_several_or_a_list(config: Config, photos: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(photos.glob("*/*"))]
    one = run_reconstruction(config, ReconstructionJob((paths[2],), tmp_path / "one"), Ranks())
    assert one["images"] == 1
    two = run_reconstruction(config, ReconstructionJob((paths[2], paths[0]), tmp_path / "two"), Ranks())
    assert two["images"] == 2
    (tmp_path / "list.csv").write_text("".join(f"{path},0\n" for path in (paths[2], paths[0])))
    run_reconstruction(config, ReconstructionJob((str(tmp_path / "list.csv"),), tmp_path / "listed"), Ranks())
    for i in range(2):
        expected = image(tmp_path / "two/reconstructions", i)
        assert np.array_equal(image(tmp_path / "listed/reconstructions", i), expected)
    assert np.array_equal(image(tmp_path / "one/reconstructions", 0), image(tmp_path / "two/reconstructions", 0))


def test_bfloat16_is_close(config: Config, photos: Path, tmp_path: Path) -> None:
    run_reconstruction(config, job_of(photos, tmp_path / "exact"), Ranks())
    run_reconstruction(config, job_of(photos, tmp_path / "half", precision="bf16"), Ranks())
    difference = image(tmp_path / "exact/reconstructions", 0).astype(int) - image(tmp_path / "half/reconstructions", 0)
    assert 0 < np.abs(difference).max() < 30


def test_what_cannot_be_reconstructed_is_refused(config: Config, photos: Path, tmp_path: Path) -> None:
    job = job_of(photos, tmp_path / "out")
    run_reconstruction(config, job, Ranks())
    stage_1 = replace(config.stage_1, params=replace(config.stage_1.params, pretrained_decoder_path=None))
    for changed, wrong, message in (
        (config, replace(job, precision="bf16"), "was begun with precision fp32"),
        (config, replace(job, limit=3), "was begun with dataset"),
        (config, replace(job, rows=0), "--rows 0"),
        (config, replace(job, sources=(str(photos / "none.png"),)), "does not exist"),
        (config, replace(job, sources=(str(photos), str(photos))), "2 sources"),
        (replace(config, stage_1=stage_1), job, "pretrained_decoder_path is not set"),
    ):
        with pytest.raises(UserError, match=message):
            run_reconstruction(changed, wrong, Ranks())
    for path in photos.glob("*/*"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="none of 7 images"):
        run_reconstruction(config, job_of(photos, tmp_path / "none"), Ranks())


def test_a_run_of_decoder_training_gives_its_decoder(settings: list[str], model_files: Path, tmp_path: Path) -> None:
    from rae_fast.config_file import load_config, to_yaml

    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    left_out = [entry for entry in settings if "pretrained_decoder_path" not in entry]
    (run / "config.yaml").write_text(to_yaml(load_config(None, left_out)))
    with pytest.raises(UserError, match="has not exported its decoder"):
        open_decoder_source(None, run)
    shutil.copy(model_files / "decoder.pt", run / "export/model.pt")
    config = open_decoder_source(None, run)
    assert config.stage_1.params.pretrained_decoder_path == str(run / "export/model.pt")
    assert open_decoder_source(None, run, ["stage_1.ckpt=other.pt"]).stage_1.ckpt == "other.pt"
