"""Encoders, decoder and autoencoder against the numbers of the reference (golden README, section 3)."""

from __future__ import annotations

import re
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Stage1, Stage1Params
from rae_fast.weights import read_statistics

if TYPE_CHECKING:
    from conftest import Golden

GATE, GRADIENT_GATE = 1e-5, 5e-5
pytestmark = pytest.mark.golden("stage1/*/fixture.npz")


def build(golden: Golden, statistics: str | None = None) -> RAE:
    """The folder's autoencoder, in evaluation mode, with one of its statistics files."""
    folder, spec = golden.path.parent, golden.meta["spec"]
    encoder = str(folder / "encoder")
    params = Stage1Params(
        encoder_cls=spec["cls"],
        encoder_config_path=encoder,
        encoder_input_size=spec["enc_in"],
        encoder_params={"path": encoder},
        decoder_config_path=str(folder / "decoder_config"),
        decoder_patch_size=spec["dec"]["patch"],
        pretrained_decoder_path=str(folder / "decoder_model.pt"),
        normalization_stat_path=None if statistics is None else str(folder / statistics),
    )
    return build_rae(Stage1(params=params)).eval()


def assert_close(ours: Tensor, theirs: Tensor, gate: float = GATE, what: str = "") -> None:
    assert ours.shape == theirs.shape, what
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    assert error <= gate, f"{what}: rel {error:.2e} > {gate:.0e}"


@torch.no_grad()
def test_images_are_prepared_and_encoded_as_in_the_reference(golden: Golden) -> None:
    rae = build(golden)
    assert_close(rae.encoder.prepare(golden["in/image"]), golden["out/encoder_input"], what="encoder input")
    tokens = rae.encoder(golden["in/image"])
    assert_close(tokens, golden["out/encoder_tokens"], what="tokens")
    assert_close(tokens, golden["out/encode_flat_nostat"], what="tokens without statistics")
    assert_close(rae.encode(golden["in/image"]), golden["out/encode_nostat"], what="latents")


@torch.no_grad()
def test_statistics_in_their_three_forms_normalize_as_in_the_reference(golden: Golden) -> None:
    whole, var_only = build(golden, "stat.pt"), build(golden, "stat_varonly.pt")
    mean_none = build(golden, "stat_meannone.pt")
    mean, var = read_statistics(golden.path.parent / "stat.pt")
    assert torch.equal(mean, golden["stat/mean"])
    assert torch.equal(var, golden["stat/var"])
    assert_close(whole.encode(golden["in/image"]), golden["out/encode_stat"])
    assert_close(whole.encode(golden["in/image_native"]), golden["out/encode_native_stat"])
    assert_close(whole.decode(golden["in/latent"]), golden["out/decode_stat"])
    for rae in (var_only, mean_none):
        assert_close(rae.encode(golden["in/image"]), golden["out/encode_varonly"])
        assert_close(rae.decode(golden["in/latent"][:1]), golden["out/decode_varonly_sample0"])
    assert_close(whole(golden["in/image"][:1]), golden["out/forward_stat_sample0"])


@torch.no_grad()
def test_latent_noise_is_added_before_normalization_and_only_in_training(golden: Golden) -> None:
    rae = build(golden, "stat.pt").train()
    draws = {"noise_u": golden["in/noise_u"], "noise_n": golden["in/noise_n"]}
    prefix = "out/encode_stat_train_tau"
    for name in golden.names(prefix):
        rae.noise_tau = float(name.removeprefix(prefix))
        assert_close(rae.train().encode(golden["in/image"], **draws), golden[name])
    assert_close(rae.eval().encode(golden["in/image"], **draws), golden["out/encode_stat"])


@torch.no_grad()
def test_decoder_is_the_reference_s(golden: Golden) -> None:
    rae = build(golden)
    decoder = rae.decoder
    assert_close(decoder(golden["in/dec_tokens"]), golden["out/dec_logits"], what="same grid")
    with_class = decoder(golden["in/dec_tokens_withcls"], drop_cls_token=True)
    assert_close(with_class, golden["out/dec_logits_dropcls"], what="class token dropped")
    assert_close(decoder(golden["in/dec_tokens_othergrid"]), golden["out/dec_logits_othergrid"], what="other grid")
    assert_close(rae.decode(golden["in/latent"]), golden["out/decode_nostat"], what="pixels")
    patches = decoder(golden["in/dec_tokens"])
    counting = torch.arange(patches.numel(), dtype=torch.float32).reshape(patches.shape)
    assert torch.equal(decoder.unpatchify(counting), golden["out/unpatchify_of_arange"])


@torch.no_grad()
def test_decoder_norms_have_the_reference_s_eps(golden: Golden) -> None:
    """Inputs so small that 1e-12 and 1e-6 under the root differ visibly."""
    decoder = build(golden).decoder
    for name, parameter in decoder.named_parameters():
        small = name in ("decoder_pos_embed", "trainable_cls_token") or name.startswith("decoder_embed.")
        if small or ".output.dense." in name:
            parameter.mul_(2.0**-13)
    assert_close(decoder(golden["in/dec_tokens"]), golden["out/dec_logits_epsprobe"])


def test_decoder_gradients_are_the_reference_s(golden: Golden) -> None:
    rae = build(golden)
    rae.decoder.requires_grad_(True)
    latent = golden["in/latent"].requires_grad_(True)
    loss = (rae.decode(latent) - golden["in/target"]).abs().mean()
    loss.backward()
    assert_close(loss.detach(), golden["grad/loss_l1"], what="loss")
    assert_close(latent.grad, golden["grad/latent"], GRADIENT_GATE, "latent")
    parameters = dict(rae.decoder.named_parameters())
    names = [str(name) for name in golden.arrays["grad/param_names"]]
    # The bias of the keys shifts all scores of a query alike: its gradient is zero, and what is recorded is rounding.
    rounding = 1e-7 * golden["grad/param_norms"].max()
    assert sorted(names) == sorted(set(parameters) - set(golden.meta["grad_none"]))
    for name, norm, cosdot in zip(names, golden["grad/param_norms"], golden["grad/param_cosdot"], strict=True):
        g = parameters[name].grad.double().flatten()
        ours = (g * torch.cos(0.1 * torch.arange(len(g), dtype=torch.float64))).sum()
        assert (g.norm() - norm).abs() <= GRADIENT_GATE * norm + rounding, name
        assert (ours - cosdot).abs() <= GRADIENT_GATE * norm * sqrt(len(g)) + rounding, name


def test_every_array_of_the_file_is_looked_at_by_some_test(golden: Golden) -> None:
    used = (
        r"meta|stat/(mean|var)|in/(image(_native)?|latent|target|noise_[un]|dec_tokens(_withcls|_othergrid)?)"
        r"|out/(encoder_(input|tokens)|encode_(nostat|stat|varonly|flat_nostat|native_stat|stat_train_tau[\d.]+))"
        r"|out/(decode_(nostat|stat|varonly_sample0)|forward_stat_sample0|unpatchify_of_arange)"
        r"|out/dec_logits(_dropcls|_othergrid|_epsprobe)?|grad/(loss_l1|latent|param_(names|norms|cosdot))"
    )
    assert [name for name in golden.arrays.files if not re.fullmatch(used, name)] == []


def test_autoencoder_without_its_encoder_decodes_alike(golden: Golden, tmp_path: Path) -> None:
    """Sampling needs the decoder, its statistics, and nothing of the encoder's weights."""
    whole = build(golden, "stat.pt")
    folder, spec = golden.path.parent, golden.meta["spec"]
    weightless = tmp_path / "encoder"
    weightless.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (weightless / name).write_bytes((folder / "encoder" / name).read_bytes())
    params = Stage1Params(
        encoder_cls=spec["cls"],
        encoder_input_size=spec["enc_in"],
        encoder_params={"path": str(weightless)},
        decoder_config_path=str(folder / "decoder_config" / "config.json"),
        decoder_patch_size=spec["dec"]["patch"],
        pretrained_decoder_path=str(folder / "decoder_model.pt"),
        normalization_stat_path=str(folder / "stat.pt"),
    )
    alone = build_rae(Stage1(params=params), need_encoder=False).eval()
    assert torch.equal(alone.decode(golden["in/latent"]), whole.decode(golden["in/latent"]))
