"""The reference's own files: read, computed with, and written back (golden README, section 8)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder, load_decoder_config, load_decoder_weights
from rae_fast.dit.registry import build_dit
from rae_fast.interop.archive import pack, unpack
from rae_fast.interop.official import (
    convert_decoder,
    convert_dit,
    convert_statistics,
    load_dit_weights,
    read_dit_weights,
    save_content,
)
from rae_fast.weights import read_statistics

if TYPE_CHECKING:
    from conftest import Golden

GATE = 1e-5


Find = Callable[[str], Path]


def read(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def some(folder: Path, *patterns: str) -> list[Path]:
    """The files that a pattern matches; the test is skipped where there are none."""
    found = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if not found:
        pytest.skip(f"no {' or '.join(patterns)} in {folder}")
    return found


def assert_same(first: Any, second: Any) -> None:
    """Equal in structure, in plain values, and in every tensor's bytes."""
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def stage2_checkpoints(golden_dir: Path) -> list[Path]:
    """Training checkpoints that hold a diffusion transformer."""
    return [file for file in some(golden_dir, "ckpt/ep-*.pt") if "disc" not in read(file)]


@torch.no_grad()
def test_training_checkpoints_and_released_weights_compute_what_they_did(
    golden_dir: Path, golden_file: Find, read_golden: Callable[[str], Golden]
) -> None:
    golden = read_golden("ckpt/stage2_ckpt_io.npz")
    inputs = [golden[f"in/{name}"] for name in ("x", "t", "y")]
    cases = [(golden_file("ckpt/stage2_model.pt"), "ema")]
    cases += [(file, which) for file in stage2_checkpoints(golden_dir) for which in ("ema", "model")]
    for file, which in cases:
        model = build_dit(golden.meta.get("kind", "DiTDH"), golden.meta["config"]).eval()
        load_dit_weights(model, file, which)
        theirs = golden[f"out/{which}_forward"]
        error = ((model(*inputs) - theirs).norm() / theirs.norm()).item()
        assert error <= GATE, f"{file.name} {which}: {error:.2e}"


def test_dit_weights_go_out_and_back_byte_equal(golden_dir: Path, golden_file: Find, tmp_path: Path) -> None:
    released = golden_file("ckpt/stage2_model.pt")
    convert_dit(released, tmp_path / "ours.safetensors")
    convert_dit(tmp_path / "ours.safetensors", tmp_path / "back.pt")
    before, after = read(released), read(tmp_path / "back.pt")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for file in stage2_checkpoints(golden_dir):
        for which in ("ema", "model"):
            convert_dit(file, tmp_path / "bare.pt", which)
            assert_same(dict(read(file)[which]), dict(read(tmp_path / "bare.pt")))


def test_whole_checkpoints_go_out_and_back_byte_equal(golden_dir: Path, tmp_path: Path) -> None:
    for file in some(golden_dir, "ckpt/*.pt", "stage1/*/*.pt"):
        count = pack(file, tmp_path / "whole.safetensors")
        assert unpack(tmp_path / "whole.safetensors", tmp_path / "back.pt") == count
        assert_same(read(file), read(tmp_path / "back.pt"))


def test_stage1_checkpoints_give_their_decoder(golden_dir: Path, golden_file: Find, tmp_path: Path) -> None:
    """The EMA decoder is what the reference's extract_decoder.py wrote beside it."""
    extracted, half = (read(golden_file(f"ckpt/{name}.pt")) for name in ("decoder_ema", "decoder_model_bf16"))
    for file in some(golden_dir, "ckpt/stage1_ep-*.pt"):
        convert_decoder(file, tmp_path / "ema.pt")
        assert_same(dict(extracted), dict(read(tmp_path / "ema.pt")))
        convert_decoder(file, tmp_path / "bf16.pt", "model", "bf16")
        assert_same(dict(half), dict(read(tmp_path / "bf16.pt")))


def decoder_of(tensors: dict[str, Tensor]) -> ViTDecoder:
    """A decoder with the sizes that its tensors have."""
    width, channels = tensors["decoder_embed.weight"].shape
    layers = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"decoder_layers\.(\d+)\.", name)))
    patch_values = len(tensors["decoder_pred.weight"])
    return ViTDecoder(
        DecoderConfig(
            hidden_size=channels,
            grid=round((tensors["decoder_pos_embed"].shape[1] - 1) ** 0.5),
            patch_size=round((patch_values / 3) ** 0.5),
            decoder_hidden_size=width,
            decoder_num_hidden_layers=layers,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=len(tensors["decoder_layers.0.intermediate.dense.weight"]),
        )
    )


def test_decoders_load_from_every_form_of_file(golden_dir: Path, golden_file: Find) -> None:
    average = read(golden_file("ckpt/decoder_ema.pt"))
    decoder = decoder_of(average)
    for file in some(golden_dir, "ckpt/decoder_*.pt", "ckpt/stage1_ep-*.pt"):
        load_decoder_weights(decoder, file)
        wanted = read(file) if "bf16" in file.name else average
        loaded = decoder.state_dict()
        assert all(torch.equal(loaded[name], value.float()) for name, value in wanted.items()), file.name


def test_encoder_names_of_any_transformers_version_are_passed_over(
    golden_dir: Path, golden_file: Find, tmp_path: Path
) -> None:
    decoder = read(golden_file("ckpt/decoder_ema.pt"))
    for file in some(golden_dir, "ckpt/stage1_module_keys_transformers*.json"):
        for names in json.loads(file.read_text()).values():
            encoder = {name: torch.zeros(1) for name in names if name.startswith("encoder.")}
            held = {**encoder, **{f"decoder.{name}": value for name, value in decoder.items()}}
            save_content(tmp_path / "stage1.pt", {"step": 1, "model": held, "ema": held})
            convert_decoder(tmp_path / "stage1.pt", tmp_path / "bare.pt")
            assert_same(dict(decoder), dict(read(tmp_path / "bare.pt")))


@pytest.mark.parametrize("form", ["stat.pt", "stat_varonly.pt", "stat_meannone.pt"])
def test_statistics_of_all_three_forms_go_out_and_back(golden_dir: Path, tmp_path: Path, form: str) -> None:
    for file in some(golden_dir, f"stage1/*/{form}"):
        content = read(file)
        convert_statistics(file, tmp_path / "ours.safetensors")
        convert_statistics(tmp_path / "ours.safetensors", tmp_path / "back.pt")
        back = read(tmp_path / "back.pt")
        assert set(back) == {"mean", "var"}
        for name in back:
            assert_same(content.get(name), back[name])
        for ours, name in zip(read_statistics(tmp_path / "back.pt"), ("mean", "var"), strict=True):
            assert_same(ours, content.get(name))


def test_optimizer_state_follows_the_order_of_our_parameters(
    golden_file: Find, read_golden: Callable[[str], Golden]
) -> None:
    """Exported moments are numbered by our module's order, which must be the reference's."""
    facts = json.loads(golden_file("ckpt/format.json").read_text())["stage2_train_ckpt"]
    meta = read_golden("ckpt/stage2_ckpt_io.npz").meta
    model = build_dit(meta.get("kind", "DiTDH"), meta["config"])
    assert [name for name, _ in model.named_parameters()] == facts["optimizer_param_order"]


def test_a_decoder_config_may_write_its_patch_size_as_text(golden_dir: Path, tmp_path: Path) -> None:
    for file in some(golden_dir, "stage1/*/decoder_config/config.json"):
        content = json.loads(file.read_text())
        (tmp_path / "config.json").write_text(json.dumps({**content, "patch_size": str(content["patch_size"])}))
        assert load_decoder_config(tmp_path) == load_decoder_config(file)


def test_no_golden_checkpoint_needs_pickled_code(golden_dir: Path) -> None:
    for file in stage2_checkpoints(golden_dir):
        assert read_dit_weights(file)
