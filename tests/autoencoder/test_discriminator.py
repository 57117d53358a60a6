"""The discriminator: where its weights come from, and what its logits depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError

from rae_fast.autoencoder.discriminator import (
    RECIPES,
    DinoBackbone,
    DinoRecipe,
    SpectralConv1d,
    build_backbone,
    build_heads,
    load_backbone_weights,
)
from rae_fast.config import DiscriminatorArch
from rae_fast.errors import UserError
from rae_fast.patches import embed_patches

SIZES = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "image_size": 32}
ARCH = DiscriminatorArch(recipe=SIZES, key_depths=[0, 7])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write_checkpoint(path: Path, **sizes: int) -> dict[str, torch.Tensor]:
    """A random DINO ViT's file, with noise in the key biases as the released ones have."""
    backbone = DinoBackbone(DinoRecipe(**{**SIZES, **sizes}), [0])
    generator = torch.Generator().manual_seed(1)
    weights = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in backbone.state_dict().items()}
    torch.save(weights, path)
    return weights


def test_key_depths_beyond_the_backbone_are_left_out(images: torch.Tensor) -> None:
    backbone = build_backbone(ARCH)
    activations = backbone(images)
    assert backbone.key_depths == (0,)
    assert [tuple(a.shape) for a in activations] == [(4, 32, 16)] * 2
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_random_backbone_is_announced_and_the_same_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (build_backbone(ARCH, seed=seed) for seed in (3, 3, 4))
    assert "random" in capsys.readouterr().out
    weights = [backbone.blocks[0].attn["qkv"].weight for backbone in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_checkpoint_is_loaded_with_its_key_biases_zeroed(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "dino.pth")
    backbone = build_backbone(DiscriminatorArch(recipe=SIZES, dino_ckpt_path=str(tmp_path / "dino.pth")))
    bias, given = backbone.blocks[1].attn["qkv"].bias, weights["blocks.1.attn.qkv.bias"]
    assert bias[32:64].abs().max() == 0
    assert torch.equal(bias[:32], given[:32]) and torch.equal(bias[64:], given[64:])
    assert torch.equal(backbone.blocks[1].mlp["fc2"].weight, weights["blocks.1.mlp.fc2.weight"])


def test_positions_of_another_grid_are_interpolated(tmp_path: Path, images: torch.Tensor) -> None:
    weights = write_checkpoint(tmp_path / "dino.pth")
    arch = DiscriminatorArch(recipe={**SIZES, "image_size": 64}, dino_ckpt_path=str(tmp_path / "dino.pth"))
    backbone = build_backbone(arch)
    assert backbone.pos_embed.shape == (1, 65, 32)
    assert torch.equal(backbone.pos_embed[:, 0], weights["pos_embed"][:, 0])
    assert backbone(images)[0].shape == (4, 32, 64)  # images of 32 pixels are resized to the recipe's 64


def test_images_of_512_pixels_are_judged_at_the_backbone_s_size() -> None:
    arch = DiscriminatorArch(recipe={**SIZES, "depth": 1, "patch_size": 16, "image_size": 224}, key_depths=[0], ks=9)
    backbone = build_backbone(arch)
    heads = build_heads(arch, backbone)
    x = (torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    logits = heads(backbone(x))
    assert logits.shape == (1, 2 * 14 * 14)
    small = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
    assert torch.equal(backbone(x)[0], backbone(small)[0])
    (grad,) = torch.autograd.grad(logits.sum(), x)
    assert bool(grad.isfinite().all()) and grad.abs().sum() > 0


@pytest.mark.parametrize("name", RECIPES)
def test_timm_s_dino_vits_fit_their_recipes(name: str) -> None:
    recipe, timm_name = RECIPES[name]
    with torch.device("meta"):
        theirs = timm.create_model(timm_name, pretrained=False, num_classes=0).state_dict()
        ours = DinoBackbone(recipe, [2, 5, 8, 11]).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: theirs[key].shape for key in ours}


def test_backbone_computes_what_timm_s_dino_computes() -> None:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch8_224", num_classes=0, act_layer="gelu_tanh", **sizes).eval()
    ours = DinoBackbone(DinoRecipe(**SIZES), [0])
    load_backbone_weights(ours, theirs.state_dict(), "timm")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    normalized = ((x + 1) / 2 - ours.mean) / ours.std
    with torch.no_grad():
        wanted = theirs.forward_intermediates(normalized, [0, 1], output_fmt="NLC", intermediates_only=True)
    for found, theirs_BLC in zip(ours(x), reversed(wanted), strict=True):
        assert torch.allclose(found, theirs_BLC.transpose(1, 2), atol=1e-5)


def test_weights_that_timm_cannot_fetch_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: object) -> None:
        raise LocalEntryNotFoundError("no route to host\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError) as caught:
        build_backbone(DiscriminatorArch(recipe="S_8"))
    assert all(word in str(caught.value) for word in ("vit_small_patch8_224.dino", "no route", "dino_ckpt_path"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        (DiscriminatorArch(recipe="S_9"), ["S_9", "S_8"]),
        (DiscriminatorArch(recipe={"width": 3}), ["width", "embed_dim"]),
        (DiscriminatorArch(recipe={**SIZES, "num_heads": 5}), ["num_heads"]),
        (DiscriminatorArch(recipe=SIZES, dino_ckpt_path="/nowhere/dino.pth"), ["/nowhere/dino.pth"]),
    ],
)
def test_unusable_recipes_are_refused_by_name(arch: DiscriminatorArch, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_backbone(arch)
    assert all(word in str(caught.value) for word in words)


def test_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dino.pth", embed_dim=64)
    with pytest.raises(UserError, match="recipe"):
        build_backbone(DiscriminatorArch(recipe=SIZES, dino_ckpt_path=str(tmp_path / "dino.pth")))
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"broken\.pth"):
        build_backbone(DiscriminatorArch(recipe=SIZES, dino_ckpt_path=str(tmp_path / "broken.pth")))


@pytest.mark.parametrize("norm_type", ["bn", "gn"])
def test_logits_of_an_image_do_not_depend_on_its_batch(images: torch.Tensor, norm_type: str) -> None:
    backbone = build_backbone(ARCH)
    heads = build_heads(DiscriminatorArch(recipe=SIZES, key_depths=[0], norm_type=norm_type), backbone).eval()
    whole = heads(backbone(images))
    alone = torch.cat([heads(backbone(images[i : i + 1])) for i in range(4)])
    assert whole.shape == (4, 2 * 16)
    assert torch.allclose(whole, alone, atol=1e-4)


def test_group_norm_needs_a_width_that_its_groups_divide() -> None:
    backbone = build_backbone(DiscriminatorArch(recipe={**SIZES, "embed_dim": 48}))
    with pytest.raises(UserError, match="48"):
        build_heads(DiscriminatorArch(norm_type="gn"), backbone)


def test_one_call_on_two_sets_equals_two_calls(images: torch.Tensor) -> None:
    backbone = build_backbone(ARCH)
    first, second = build_heads(ARCH, backbone, seed=1), build_heads(ARCH, backbone, seed=1)
    fake, real = backbone(images[:2]), backbone(images[2:])
    both = first(fake, real)
    assert torch.equal(both[0], second(fake)) and torch.equal(both[1], second(real))
    buffers = dict(second.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in first.named_buffers())


def test_power_iteration_finds_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    conv = SpectralConv1d(12, 8, 3).train()
    x = torch.randn(2, 12, 16)
    for _ in range(200):
        conv(x)
    conv.eval()
    before = conv.weight_u.clone()
    largest = torch.linalg.matrix_norm(conv.weight_orig.flatten(1), 2)
    expected = F.conv1d(F.pad(x, (1, 1), mode="circular"), conv.weight_orig / largest, conv.bias)
    assert torch.allclose(conv(x), expected, atol=1e-4)
    assert torch.equal(conv.weight_u, before)  # evaluation leaves the estimate alone


def test_power_iteration_is_in_float32_under_autocast(images: torch.Tensor) -> None:
    backbone = build_backbone(ARCH)
    exact, rough = build_heads(ARCH, backbone, seed=1), build_heads(ARCH, backbone, seed=1)
    activations = backbone(images)
    expected = exact(activations)
    with torch.autocast("cpu", torch.bfloat16):
        logits = rough(activations)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=0.1) and not torch.equal(logits, expected)
    buffers = dict(rough.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in exact.named_buffers())
    logits.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in rough.parameters())


def test_patch_embedding_as_a_product_is_the_convolution() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 24, 16), torch.randn(5, 3, 8, 8), torch.randn(5)
    expected = F.conv2d(x, weight, bias, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(embed_patches(x, weight, bias), expected, atol=1e-4)
