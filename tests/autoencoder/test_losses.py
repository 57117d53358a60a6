"""Losses of decoder training where no reference number exists (those are in tests/golden/test_disc.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rae_fast.autoencoder.losses import (
    VGG_FILE,
    EncoderPerceptual,
    PatchConvolutionsAsProducts,
    encoder_features,
    find_vgg_weights,
    load_lpips,
)
from rae_fast.encoders import FrozenEncoder, build_encoder
from rae_fast.errors import UserError


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> FrozenEncoder:
    return build_encoder("Dinov2withNorm", input_size=32, params={"dinov2_path": str(tiny_encoder)})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_missing_vgg_weights_are_named_with_a_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_vgg_weights() is None
    with pytest.raises(UserError) as caught:
        load_lpips()
    assert all(word in str(caught.value) for word in (str(tmp_path / "checkpoints" / VGG_FILE), "curl", "encoder"))


def test_vgg_weights_are_found_in_torchvision_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / VGG_FILE).write_bytes(b"")
    assert find_vgg_weights() == tmp_path / "checkpoints" / VGG_FILE


@pytest.mark.parametrize("content", [b"garbage", None])
def test_a_file_that_is_not_vgg_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "vgg.pth"
    if content is None:
        torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"vgg\.pth"):
        load_lpips(str(path))


def test_encoder_distance_is_zero_for_equal_images_and_grows_with_the_difference(
    encoder: FrozenEncoder, images: torch.Tensor
) -> None:
    perceptual = EncoderPerceptual(encoder_features(encoder))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert float(perceptual(images, images)) == 0.0
    distances = [float(perceptual(images + scale * noise, images)) for scale in (0.02, 0.1, 0.5)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_encoder_distance_has_gradients_for_the_image_alone(encoder: FrozenEncoder, images: torch.Tensor) -> None:
    perceptual = EncoderPerceptual(encoder_features(encoder))
    recon = (images + 0.1).requires_grad_()
    perceptual(recon, images).backward()
    assert recon.grad is not None and float(recon.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_features_come_from_several_blocks_and_leave_the_encoder_as_it_was(
    encoder: FrozenEncoder, images: torch.Tensor
) -> None:
    before, layers = encoder(images), encoder.layers
    features = encoder_features(encoder)(images)
    assert [tuple(part.shape) for part in features] == [(3, 16, 32)] * 2
    assert encoder.layers == layers and torch.equal(encoder(images), before)


def test_only_tiling_convolutions_become_products(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    tiling, overlapping = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(3, 4, 8, 4)
    with PatchConvolutionsAsProducts():
        products = tiling(images), overlapping(images)
    for ours, conv in zip(products, (tiling, overlapping), strict=True):
        assert torch.allclose(ours, conv(images), atol=1e-5)
