"""Drawing: which bits depend on what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Config
from rae_fast.dit.registry import build_dit
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.sampling import LatentSampler, decode_images, draw_images, draw_latents, load_sampler
from rae_fast.sampling.accelerate import accelerate, store_for_autocast
from rae_fast.sampling.sampler import pieces

CPU = torch.device("cpu")
COUNT = 75
LABELS = np.arange(COUNT) % 3


def sampler_of(config: Config, device: torch.device = CPU, **options: object) -> LatentSampler:
    return load_sampler(config, resolve_geometry(config), device, **options)


def in_precision(config: Config, precision: str) -> Config:
    return replace(config, runtime=replace(config.runtime, precision=precision))


def in_batches(config: Config, size: int, device: torch.device = CPU) -> np.ndarray:
    """All images, drawn `size` at a time."""
    sampler, rae = sampler_of(config, device), build_rae(config.stage_1, need_encoder=False).to(device).eval()
    index = np.arange(COUNT)
    drawn = [
        draw_images(sampler, rae, LABELS[i : i + size], index[i : i + size], seed=3) for i in range(0, COUNT, size)
    ]
    return np.concatenate(drawn)


def test_pieces_have_the_same_number_of_rows_always() -> None:
    cut = list(pieces(5, 3))
    assert [piece.tolist() for piece, _ in cut] == [[0, 1, 2], [3, 4]]
    assert [padded.tolist() for _, padded in cut] == [[0, 1, 2], [3, 4, 4]]


def test_images_do_not_depend_on_the_batch_bit_by_bit_in_float32(config: Config) -> None:
    few, many = in_batches(config, 7), in_batches(config, 64)
    assert np.array_equal(few, many)
    assert len({image.tobytes() for image in many}) == COUNT


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_adaptive_solvers_do_not_let_samples_depend_on_one_another(config: Config, method: str) -> None:
    params = replace(config.sampler.params, sampling_method=method, rtol=1e-2, atol=1e-2)
    config = replace(config, sampler=replace(config.sampler, params=params))
    sampler, index = sampler_of(config), np.arange(5)
    many = draw_latents(sampler, LABELS[:5], index, seed=3)
    assert torch.equal(draw_latents(sampler, LABELS[3:5], index[3:5], seed=3), many[3:5])
    fine = replace(config, sampler=replace(config.sampler, params=replace(params, rtol=1e-5, atol=1e-5)))
    exact = draw_latents(sampler_of(fine), LABELS[:5], index, seed=3)
    assert 0 < float((many - exact).norm() / exact.norm()) < 0.05


def test_images_do_not_depend_on_the_batch_by_more_than_a_level_in_bfloat16(config: Config) -> None:
    few, many = (in_batches(in_precision(config, "bf16"), size).astype(int) for size in (7, 64))
    assert np.abs(few - many).max() <= 1
    exact = in_batches(config, 64).astype(int)
    assert 0 < np.abs(many - exact).max() < 40, "bfloat16 was not used, or is far off"


def test_images_do_not_depend_on_the_number_of_threads(config: Config) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = in_batches(config, 64)
        torch.set_num_threads(2)
        two = in_batches(config, 64)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(one, two)


@pytest.mark.parametrize("target", ["DiTDH", "LightningDiT"])
@pytest.mark.parametrize("patch", [1, 2])
def test_weights_kept_for_autocast_give_the_bits_of_autocast(target: str, patch: int) -> None:
    torch.manual_seed(0)
    wide = {"hidden_size": [32, 48], "depth": [2, 1], "num_heads": [2, 2]}
    sizes = wide if target == "DiTDH" else {"hidden_size": 32, "depth": 2, "num_heads": 2}
    model = build_dit(target, {**sizes, "input_size": 4, "patch_size": patch, "in_channels": 16, "num_classes": 3})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.eval().requires_grad_(False)
    x, t, y = torch.randn(4, 16, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, t, y)
        store_for_autocast(model, torch.bfloat16)
        assert {p.dtype for p in model.blocks.parameters()} == {torch.float32, torch.bfloat16}
        assert torch.equal(model(x, t, y), expected)


def test_asking_for_a_gpu_s_means_on_a_cpu_draws_the_same_and_says_so(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    index = np.arange(3)
    expected = draw_latents(sampler_of(config), LABELS[:3], index, 0)
    compiled = replace(config, runtime=replace(config.runtime, compile=True))
    sampler = sampler_of(compiled, cuda_graphs=True)
    assert "compilation and CUDA graphs: only on a GPU" in capsys.readouterr().err
    assert torch.equal(draw_latents(sampler, LABELS[:3], index, 0), expected)


def test_decoding_does_not_depend_on_how_many_are_decoded(config: Config) -> None:
    rae = build_rae(config.stage_1, need_encoder=False).eval()
    z = torch.randn(40, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(decode_images(rae, z)[:3], decode_images(rae, z[:3]))


def test_guidance_without_a_null_label_is_refused(config: Config) -> None:
    model = build_dit("DiTDH", {**config.stage_2.params, "class_dropout_prob": 0, "input_size": 4, "in_channels": 16})
    sampler = LatentSampler(model.eval(), config, resolve_geometry(config))
    with pytest.raises(UserError, match="no null label"):
        draw_latents(sampler, LABELS[:1], np.arange(1), 0)


def test_weights_that_are_missing_or_of_another_model_are_refused(config: Config) -> None:
    for ckpt, message in ((None, "stage_2.ckpt is not set"), ("nowhere.pt", "does not exist")):
        with pytest.raises(UserError, match=message):
            sampler_of(replace(config, stage_2=replace(config.stage_2, ckpt=ckpt)))
    params = {**config.stage_2.params, "depth": [3, 1]}
    with pytest.raises(UserError, match="depth, in blocks"):
        sampler_of(replace(config, stage_2=replace(config.stage_2, params=params)))


def test_every_block_of_model_and_guide_would_be_compiled_on_a_gpu(config: Config) -> None:
    model = sampler_of(config).model
    accelerate(model, torch.device("cuda"), compiled=True, cuda_graphs=False)
    assert all(block._compiled_call_impl is not None for block in model.blocks)
