"""The autoencoder: normalization, noise, statistics files, and building from a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder
from rae_fast.autoencoder.rae import RAE, add_latent_noise, build_rae
from rae_fast.config import Stage1, Stage1Params
from rae_fast.errors import UserError
from rae_fast.weights import read_statistics

WIDTH, GRID = 24, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, a decoder's configuration and weights, and statistics."""
    root = tmp_path_factory.mktemp("rae")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7
    )
    transformers.Dinov2Model(config).save_pretrained(root / "encoder")
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (root / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor))
    sizes = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 24,
    }
    (root / "decoder.json").write_text(json.dumps({**sizes, "patch_size": "16"}))
    decoder = ViTDecoder(DecoderConfig(hidden_size=WIDTH, grid=GRID, patch_size=8, **sizes))
    torch.save(decoder.state_dict(), root / "decoder.pt")
    shape = (WIDTH, GRID, GRID)
    torch.save({"mean": torch.randn(shape), "var": torch.rand(shape) + 0.1}, root / "stat.pt")
    return root


def stage1(folder: Path, **params: object) -> Stage1:
    given = {
        "encoder_cls": "Dinov2withNorm",
        "encoder_input_size": 28,
        "encoder_params": {"dinov2_path": str(folder / "encoder")},
        "decoder_config_path": str(folder / "decoder.json"),
        "decoder_patch_size": 8,
        "pretrained_decoder_path": str(folder / "decoder.pt"),
        "normalization_stat_path": str(folder / "stat.pt"),
        "noise_tau": 0.5,
    }
    return Stage1(params=Stage1Params(**{**given, **params}))


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, 32, 32)


def test_sizes_follow_from_the_encoder_and_the_patch_size(folder: Path) -> None:
    rae = build_rae(stage1(folder)).eval()
    assert rae.encode(images()).shape == (2, WIDTH, GRID, GRID)
    assert rae(images()).shape == (2, 3, 32, 32)
    assert set(rae.state_dict()) == {f"encoder.{k}" for k in rae.encoder.state_dict()} | {
        f"decoder.{k}" for k in rae.decoder.state_dict()
    }


@pytest.mark.parametrize("given", [("mean", "var"), ("var",), ("mean",), ()], ids=str)
def test_denormalize_inverts_normalize_whatever_statistics_there_are(folder: Path, given: tuple[str, ...]) -> None:
    mean, var = read_statistics(folder / "stat.pt")
    mean, var = mean if "mean" in given else None, var if "var" in given else None
    rae = RAE(None, None, mean, var)
    z = torch.randn(2, WIDTH, GRID, GRID)
    zero, one = torch.zeros(1), torch.ones(1)
    expected = (z - (zero if mean is None else mean)) / torch.sqrt((one if var is None else var) + 1e-5)
    torch.testing.assert_close(rae.normalize(z), expected if given else z)
    torch.testing.assert_close(rae.denormalize(rae.normalize(z)), z, atol=1e-6, rtol=1e-5)
    if not given:
        assert torch.equal(rae.normalize(z), z)


def test_parts_that_are_not_needed_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    whole = build_rae(stage1(folder)).eval()
    encoder_only = build_rae(stage1(folder, decoder_config_path=None), need_decoder=False).eval()
    assert torch.equal(encoder_only.encode(images()), whole.encode(images()))
    with pytest.raises(UserError, match="without its decoder"):
        encoder_only.decode(torch.zeros(1, WIDTH, GRID, GRID))
    decoder_only = build_rae(stage1(folder), need_encoder=False).eval()
    latent = torch.randn(1, WIDTH, GRID, GRID)
    assert torch.equal(decoder_only.decode(latent), whole.decode(latent))
    with pytest.raises(UserError, match="without its encoder"):
        decoder_only.encode(images())


def test_noise_has_the_drawn_strength_for_each_sample() -> None:
    torch.manual_seed(0)
    tokens = torch.zeros(3, 64, 64)
    noised = add_latent_noise(tokens, 0.8, noise_u=torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(noised.std(dim=(1, 2)), torch.tensor([0.0, 0.4, 0.8]), atol=0.02, rtol=0)
    drawn = add_latent_noise(torch.zeros(2000, 4, 4), 0.8).std(dim=(1, 2))
    # The strength is uniform on [0, 0.8].
    assert abs(drawn.mean() - 0.4) < 0.03
    assert drawn.max() < 2.0


def test_noise_is_added_in_training_only(folder: Path) -> None:
    rae = build_rae(stage1(folder))
    clean = rae.eval().encode(images())
    assert torch.equal(rae.encode(images()), clean)
    assert not torch.allclose(rae.train().encode(images()), clean, atol=1e-2)
    silent = build_rae(stage1(folder, noise_tau=0.0)).train()
    assert torch.equal(silent.encode(images()), clean)


def test_gradients_reach_the_decoder_and_stop_before_the_encoder(folder: Path) -> None:
    rae = build_rae(stage1(folder)).train()
    rae(images()).abs().mean().backward()
    assert rae.decoder.last_layer.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in rae.encoder.parameters())


def test_autoencoder_moves_between_devices_and_types_as_one(folder: Path) -> None:
    rae = build_rae(stage1(folder)).to("meta")
    assert {tensor.device.type for tensor in [*rae.parameters(), *rae.buffers()]} == {"meta"}


def test_statistics_of_another_shape_are_refused_with_both(folder: Path, tmp_path: Path) -> None:
    torch.save({"mean": torch.zeros(WIDTH, 8, 8), "var": None}, tmp_path / "stat.pt")
    with pytest.raises(UserError, match=r"`mean` has shape \[24, 8, 8\].*\[24, 4, 4\].*normalization_stat_path"):
        build_rae(stage1(folder, normalization_stat_path=str(tmp_path / "stat.pt")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"std": torch.ones(1)}, "holds std; expected"),
        ([torch.ones(1)], "holds list"),
        ({"var": torch.tensor([1.0, -1.0])}, "negative"),
        ({"mean": torch.tensor([float("nan")])}, "`mean` is not a tensor of finite numbers"),
        ({"var": 1.0}, "`var` is not a tensor"),
    ],
)
def test_files_that_hold_no_statistics_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "stat.pt")
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "stat.pt")


def test_decoder_of_other_sizes_is_refused_with_the_keys_to_check(folder: Path) -> None:
    with pytest.raises(UserError, match=r"decoder_pred.* is \[192, 16\], not \[768, 16\].*decoder_patch_size"):
        build_rae(stage1(folder, decoder_patch_size=16))
    with pytest.raises(UserError, match="decoder_config_path is not set"):
        build_rae(stage1(folder, decoder_config_path=None))


def test_a_new_decoder_is_made_where_no_weights_are_named(folder: Path) -> None:
    rae = build_rae(stage1(folder, pretrained_decoder_path=None))
    assert isinstance(rae.decoder, nn.Module)
    assert torch.equal(rae.decoder.trainable_cls_token, torch.zeros(1, 1, 16))
