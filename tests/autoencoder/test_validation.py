"""Figures of held-out images: of what, with which networks, and what a grid shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rae_fast.autoencoder.losses import VGG_CONVOLUTIONS
from rae_fast.autoencoder.trainer import DecoderRun
from rae_fast.autoencoder.validation import BATCH, DIFFERENCE_GAIN, HeldOut
from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.frechet import frechet_distance
from rae_fast.runtime import Ranks

CPU = torch.device("cpu")
SIDE = 16
VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
MakeConfig = Callable[..., Config]


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 200, (BATCH + 8, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).byte()


def held_out(images: Tensor, error: int = 0, **metrics: object) -> HeldOut:
    """Latents that are the images themselves, `error` levels brighter."""
    values = (images.float() + error + 0.5) / 255  # to 8 bits by truncation
    return HeldOut(images, values.flatten(1).split(BATCH), **metrics)


def to_pixels(values: Tensor) -> Tensor:
    return values.reshape(-1, 3, SIDE, SIDE)


def colours(images_B3SS: Tensor) -> Tensor:
    return images_B3SS.float().mean((2, 3))


def test_perfect_reconstructions_have_perfect_figures(images: Tensor) -> None:
    found = held_out(images, features=colours).measure(nn.Identity(), to_pixels, Ranks(), CPU)
    assert found["psnr_db"] == pytest.approx(100.0) and found["ssim"] == pytest.approx(1.0, abs=1e-6)
    assert found["rfid"] == pytest.approx(0.0, abs=1e-6)


def test_figures_of_a_known_error_are_known(images: Tensor) -> None:
    found = held_out(images, error=10, features=colours).measure(nn.Identity(), to_pixels, Ranks(), CPU)
    assert found["psnr_db"] == pytest.approx(20 * np.log10(25.5), abs=1e-4)
    statistics = [
        (features.mean(0), np.cov(features, rowvar=False))
        for features in (colours(part).double().numpy() for part in (images, images + 10))
    ]
    assert found["rfid"] == pytest.approx(frechet_distance(*statistics[0], *statistics[1]), rel=1e-5)
    assert found["rfid"] == pytest.approx(3 * 10**2, rel=1e-4)  # the means moved, the covariance did not


def test_a_grid_shows_originals_reconstructions_and_differences(images: Tensor, tmp_path: Path) -> None:
    held_out(images, error=10).save_grid(tmp_path / "grid.png", nn.Identity(), to_pixels, CPU)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    rows = [grid[top : top + SIDE, :SIDE] for top in (0, SIDE + 2, 2 * (SIDE + 2))]
    first = images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(rows[0], first) and np.array_equal(rows[1], first + 10)
    assert (rows[2] == 10 * DIFFERENCE_GAIN).all()


@pytest.fixture
def vgg_file(tmp_path: Path) -> Path:
    """VGG16's convolutions with random weights."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for i, layer in enumerate(VGG_CONVOLUTIONS):
        inputs, outputs = VGG_CHANNELS[i : i + 2]
        kernel = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        weights |= {f"features.{layer}.weight": kernel, f"features.{layer}.bias": torch.zeros(outputs)}
    torch.save(weights, tmp_path / "vgg.pth")
    return tmp_path / "vgg.pth"


def evaluated(config: Config) -> dict[str, float]:
    run = DecoderRun(config, Ranks(), CPU, Path(config.logging.run_folder))
    run.evaluate()
    run.close()
    return run.last_evaluation


def test_every_metric_is_measured_while_training(decoder_config: MakeConfig, tmp_path: Path, vgg_file: Path) -> None:
    metrics = ["eval.metrics=[psnr,ssim,lpips,rfid]", "eval.features=encoder", f"gan.loss.lpips_weights={vgg_file}"]
    found = evaluated(decoder_config(tmp_path / "run", *metrics))
    assert list(found) == ["psnr_db", "ssim", "lpips", "rfid"]
    assert all(np.isfinite(value) and value > 0 for value in found.values())


def test_a_metric_whose_weights_are_missing_is_refused_by_the_file_s_name(
    decoder_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for metric, file in (("lpips", "vgg16"), ("rfid", "inception")):
        with pytest.raises(UserError, match=file):
            evaluated(decoder_config(tmp_path / metric, f"eval.metrics=[{metric}]"))
        assert not (tmp_path / metric / "manifest.json").exists()
