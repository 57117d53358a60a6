"""The reconstruction report: of files, and of what an autoencoder makes of held-out images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.autoencoder.losses import VGG_CONVOLUTIONS, load_lpips
from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.evaluation.image_sets import open_images
from rae_fast.evaluation.images import save_npz, to_uint8
from rae_fast.evaluation.pairs import ReconstructionJob, evaluate_reconstruction
from rae_fast.evaluation.reconstruction import psnr, ssim
from rae_fast.provenance import read_json
from rae_fast.runtime import Ranks

DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "patch_size": 8,
}


@pytest.fixture
def job(tiny_features: str, pack: Callable[..., str], tmp_path: Path) -> ReconstructionJob:
    originals = pack("originals.npz", 40, 1)
    noise = np.random.default_rng(0).integers(-20, 21, (40, 16, 16, 3))
    restored = (np.load(originals)["arr_0"] + noise).clip(0, 255).astype(np.uint8)
    save_npz(tmp_path / "restored.npz", restored)
    return ReconstructionJob(
        originals,
        str(tmp_path / "restored.npz"),
        ("psnr", "ssim", "rfid"),
        tmp_path / "out",
        tmp_path / "cache",
        features=tiny_features,
    )


def test_figures_are_means_over_images_and_twice_the_same(job: ReconstructionJob) -> None:
    report = evaluate_reconstruction(job, None, Ranks())
    original, restored = (
        torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2) for path in (job.originals, job.restored)
    )
    assert report["metrics"]["pairs"] == {
        "psnr_db": pytest.approx(psnr(restored, original).mean().item(), rel=1e-6),
        "ssim": pytest.approx(ssim(restored, original).mean().item(), rel=1e-5),
    }
    assert report["metrics"][job.features]["rfd"] > 0
    again = evaluate_reconstruction(job, None, Ranks())
    assert {k: v for k, v in again.items() if k != "run"} == {k: v for k, v in report.items() if k != "run"}
    assert read_json(job.out / "report.json") == json.loads(json.dumps(again))
    assert (job.out / "pairs.png").exists() and "PSNR, dB" in (job.out / "report.html").read_text()


def test_originals_restore_themselves(job: ReconstructionJob) -> None:
    report = evaluate_reconstruction(replace(job, restored=job.originals), None, Ranks())
    assert report["metrics"]["pairs"] == {"psnr_db": pytest.approx(100), "ssim": pytest.approx(1)}
    assert report["metrics"][job.features]["rfd"] == pytest.approx(0, abs=1e-9)


def test_sets_that_do_not_pair_up_and_unknown_metrics_are_refused(
    job: ReconstructionJob, pack: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for change, message in (
        ({"restored": pack("fewer.npz", 39, 1)}, "39 images"),
        ({"restored": pack("larger.npz", 40, 1, 32)}, "32x32"),
        ({"metrics": ("psrn",)}, "did you mean 'psnr'"),
        ({"metrics": ("lpips",)}, "VGG16"),
        ({"restored": None}, "no decoder weights"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_reconstruction(replace(job, **change), None, Ranks())


def test_a_decoder_is_measured_on_held_out_images(
    job: ReconstructionJob, cache_config: Callable[..., Config], pristine_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "decoder.json").write_text(json.dumps(DECODER))
    decoder = ViTDecoder(replace(load_decoder_config(tmp_path / "decoder.json"), hidden_size=32, grid=4, patch_size=8))
    torch.save(decoder.state_dict(), tmp_path / "decoder.pt")
    config = cache_config(
        tmp_path / "no store",
        f"stage_1.params.decoder_config_path={tmp_path / 'decoder.json'}",
        f"stage_1.params.pretrained_decoder_path={tmp_path / 'decoder.pt'}",
    )
    of_decoder = replace(job, originals=str(pristine_store), restored=None)
    report = evaluate_reconstruction(of_decoder, config, Ranks())
    rae, images = build_rae(config.stage_1).eval(), next(open_images(pristine_store).pieces(0, 32))
    with torch.no_grad():
        expected = to_uint8(rae(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255))
    save_npz(tmp_path / "by hand.npz", expected)
    save_npz(tmp_path / "held out.npz", images)
    by_hand = replace(job, originals=str(tmp_path / "held out.npz"), restored=str(tmp_path / "by hand.npz"))
    in_files = evaluate_reconstruction(by_hand, None, Ranks())
    again = evaluate_reconstruction(replace(of_decoder, originals=by_hand.originals), config, Ranks())
    assert again["metrics"] == in_files["metrics"]
    assert again["pairs_sha256"] == in_files["pairs_sha256"]
    assert report["samples"]["images"] == 40
    assert report["samples"]["decoder_sha256"] == again["samples"]["decoder_sha256"]


def test_lpips_is_measured_by_image_with_the_weights_named(job: ReconstructionJob, tmp_path: Path) -> None:
    generator, channels, vgg = torch.Generator().manual_seed(0), 3, {}
    for layer, width in zip(VGG_CONVOLUTIONS, (64, 64, 128, 128, *(256,) * 3, *(512,) * 6), strict=True):
        vgg[f"features.{layer}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) / (3 * channels**0.5)
        vgg[f"features.{layer}.bias"], channels = torch.zeros(width), width
    torch.save(vgg, tmp_path / "vgg.pth")
    config = load_config(None, [f"gan.loss.lpips_weights={tmp_path / 'vgg.pth'}", "runtime.device=cpu"])
    report = evaluate_reconstruction(replace(job, metrics=("lpips",)), config, Ranks())
    pairs = [
        torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2) / 255 for path in (job.restored, job.originals)
    ]
    with torch.no_grad():
        expected = load_lpips(str(tmp_path / "vgg.pth"))(*pairs)
    assert report["metrics"] == {"pairs": {"lpips": pytest.approx(float(expected), rel=1e-5)}}
    assert report["evaluators"]["lpips"]["weights_sha256"]
    same = evaluate_reconstruction(replace(job, metrics=("lpips",), restored=job.originals), config, Ranks())
    assert same["metrics"]["pairs"]["lpips"] == 0
