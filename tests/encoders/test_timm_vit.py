"""Encoders of timm, with random weights in a local file."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from rae_fast.encoders import FrozenEncoder, build_encoder, encoder_facts
from rae_fast.errors import UserError
from rae_fast.provenance import sha256_file

# A plain ViT, one with registers, a DINOv3 (rotary positions) and one without any prefix token, cut to two blocks by
# the fixture.
MODELS = {
    "vit_tiny_patch16_224": 1,
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_small_patch16_dinov3": 5,
    "vit_relpos_small_patch16_224": 0,
}
DEPTH = 2


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: whole(name, depth=DEPTH, **arguments))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = {}
    for name in MODELS:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, depth=DEPTH)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        files[name] = tmp_path_factory.mktemp("timm") / f"{name}.pt"
        torch.save(model.state_dict(), files[name])
    return files


def encoder(weights: dict[str, Path], name: str, **params: object) -> FrozenEncoder:
    patch = 14 if "patch14" in name else 16
    params = {"model_name": name, "weights": str(weights[name]), **params}
    return build_encoder("TimmViT", input_size=4 * patch, params=params)


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_timm_s_patch_tokens_under_its_norm(weights: dict[str, Path], name: str) -> None:
    ours = encoder(weights, name, normalize=False)
    assert ours.prefix_tokens == MODELS[name]
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights[name])},
        img_size=ours.input_size,
        num_classes=0,
    ).eval()
    with torch.no_grad():
        theirs = model.forward_features(ours.prepare(images()))[:, MODELS[name] :]
    assert ours(images()).shape == (2, 16, ours.hidden_size)
    torch.testing.assert_close(ours(images()), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_without_affine_tokens_are_standardized_and_layers_are_averaged(weights: dict[str, Path], name: str) -> None:
    single = [encoder(weights, name, layers=[layer])(images()) for layer in range(DEPTH)]
    torch.testing.assert_close(single[1], encoder(weights, name)(images()))
    torch.testing.assert_close(single[1].var(-1, unbiased=False), torch.ones(2, 16), atol=1e-2, rtol=0)
    mean = encoder(weights, name, layers=[0, 1])(images())
    torch.testing.assert_close(mean, (single[0] + single[1]) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "cait_xxs24_224"])
def test_class_tokens_that_come_behind_the_blocks_are_no_prefix(tmp_path: Path, name: str) -> None:
    torch.save(timm.create_model(name, num_classes=0, img_size=64).state_dict(), tmp_path / "weights.pt")
    params = {"model_name": name, "weights": str(tmp_path / "weights.pt"), "layers": [0, 1]}
    ours = build_encoder("TimmViT", input_size=64, params=params)
    assert ours.prefix_tokens == 0
    assert ours(images()).shape == (2, 16, ours.hidden_size)
    if name.startswith("cait"):  # whose positions timm does not interpolate
        with pytest.raises(UserError, match=r"cannot be loaded.*pos_embed"):
            build_encoder("TimmViT", input_size=32, params=params)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_gives_float32_tokens_close_to_the_exact_ones(weights: dict[str, Path], name: str) -> None:
    exact, rough = encoder(weights, name)(images()), encoder(weights, name, dtype="bf16")(images())
    assert rough.dtype == torch.float32
    assert ((rough - exact).norm() / exact.norm()) < 0.1


def test_the_model_is_compiled_where_that_is_asked_for(
    weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    encoder(weights, "vit_tiny_patch16_224", compile=True)
    assert compiled == ["VisionTransformer"]


def test_patches_that_are_not_square_are_refused(weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: whole(name, patch_size=(16, 8), **arguments))
    with pytest.raises(UserError, match=r"patches of \(16, 8\) pixels; expected square"):
        encoder_facts("TimmViT", params={"model_name": "vit_tiny_patch16_224"})


def test_identity_and_facts(weights: dict[str, Path]) -> None:
    name = "vit_small_patch14_reg4_dinov2"
    ours = encoder(weights, name)
    assert ours.identity()["weights_sha256"] == sha256_file(weights[name])
    assert encoder_facts("TimmViT", params={"model_name": name}) == ours.facts
    assert (ours.patch_size, ours.grid) == (14, 4)


def test_what_timm_cannot_give_is_refused(
    weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(**params: object) -> None:
        build_encoder("TimmViT", input_size=64, params=params)

    with pytest.raises(UserError, match="did you mean 'vit_tiny_patch16_224'"):
        build(model_name="vit_tinny_patch16_224")
    with pytest.raises(UserError, match=r"absent\.pt, which does not exist"):
        build(model_name="vit_tiny_patch16_224", weights=str(tmp_path / "absent.pt"))
    (tmp_path / "torn.pt").write_bytes(weights["vit_tiny_patch16_224"].read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        build(model_name="vit_tiny_patch16_224", weights=str(tmp_path / "torn.pt"))

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"no network.*encoder_params\.weights"):
        build(model_name="vit_tiny_patch16_224")


def test_convolutional_networks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(UserError, match="no patch tokens"):
        encoder_facts("TimmViT", params={"model_name": "resnet18"})
