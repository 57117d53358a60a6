"""`AutoencoderRAE` both ways, compared by what the two encode and decode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder
from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Stage1
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.interop.diffusers import (
    WEIGHTS,
    export_diffusers,
    import_diffusers,
    rename_from_diffusers,
    rename_to_diffusers,
    to_diffusers,
)
from rae_fast.weights import read_weights_file

from .conftest import make_stage1

diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "AutoencoderRAE"):
    pytest.skip("this diffusers has no AutoencoderRAE", allow_module_level=True)

GATE = 1e-5


def images(rae: RAE) -> Tensor:
    size = rae.encoder.input_size + 10
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_alike(rae: RAE, theirs: torch.nn.Module) -> None:
    """Latents, and images decoded from the same latents."""
    z = rae.encode(images(rae))
    torch.testing.assert_close(theirs.encode(images(rae)).latent, z, atol=GATE, rtol=GATE)
    assert (theirs.decode(z).sample - rae.decode(z)).abs().max() <= GATE


def loaded(folder: Path) -> torch.nn.Module:
    return diffusers.AutoencoderRAE.from_pretrained(folder, local_files_only=True).eval()


def imported(folder: Path, target: Path) -> RAE:
    return build_rae(load_config(import_diffusers(folder, target)).stage_1).eval()


def test_a_saved_export_encodes_and_decodes_like_ours_in_diffusers(stage1: Stage1, tmp_path: Path) -> None:
    rae = build_rae(stage1).eval()
    export_diffusers(rae, tmp_path / "export")
    assert_alike(rae, loaded(tmp_path / "export"))


def test_there_and_back_decodes_the_same(stage1: Stage1, tmp_path: Path) -> None:
    rae = build_rae(stage1).eval()
    export_diffusers(rae, tmp_path / "export")
    again = imported(tmp_path / "export", tmp_path / "again")
    with torch.no_grad():
        z = rae.encode(images(rae))
        torch.testing.assert_close(again.encode(images(rae)), z, atol=GATE, rtol=GATE)
        assert (again.decode(z) - rae.decode(z)).abs().max() <= GATE
    before, after = rae.decoder.state_dict(), again.decoder.state_dict()
    assert all(
        torch.equal(after[name], before[name]) for name in before if "pos_embed" not in name and "cls" not in name
    )


@pytest.mark.parametrize("missing", ["mean", "both"])
def test_missing_statistics_are_carried_over_exactly(stage1: Stage1, tmp_path: Path, missing: str) -> None:
    """diffusers divides by std + 1e-5 even where it has no std."""
    content = torch.load(stage1.params.normalization_stat_path, weights_only=True)
    torch.save({"mean": None, "var": content["var"]}, stage1.params.normalization_stat_path)
    params = replace(stage1.params, normalization_stat_path=None) if missing == "both" else stage1.params
    rae = build_rae(replace(stage1, params=params)).eval()
    export_diffusers(rae, tmp_path / "export")
    assert_alike(rae, loaded(tmp_path / "export"))
    assert_alike(imported(tmp_path / "export", tmp_path / "again"), loaded(tmp_path / "export"))


def randomized_autoencoder(kind: str, **options: object) -> torch.nn.Module:
    """A made-up model of diffusers."""
    torch.manual_seed(3)
    patch = 14 if kind == "dinov2" else 16
    options.setdefault("encoder_input_size", 2 * patch)
    model = diffusers.AutoencoderRAE(
        encoder_type=kind,
        encoder_hidden_size=64,
        encoder_patch_size=patch,
        encoder_num_hidden_layers=2,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=80,
        patch_size=4,
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_a_model_made_in_diffusers_encodes_and_decodes_the_same_here(kind: str, tmp_path: Path) -> None:
    statistics = {"latents_mean": torch.randn(64, 2, 2), "latents_std": 0.1 + torch.rand(64, 2, 2)}
    model = randomized_autoencoder(kind, scaling_factor=0.7, **statistics)
    model.save_pretrained(tmp_path / "theirs")
    assert_alike(imported(tmp_path / "theirs", tmp_path / "ours"), model)


def test_a_folder_of_several_shards_is_read_too(tmp_path: Path) -> None:
    model = randomized_autoencoder("mae")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert not (tmp_path / "theirs" / WEIGHTS).exists()
    assert_alike(imported(tmp_path / "theirs", tmp_path / "ours"), model)


def test_encoder_names_of_transformers_4_are_read_too(tmp_path: Path) -> None:
    """Released folders were written under transformers 4, whose module names differ from those of 5."""
    model = randomized_autoencoder("dinov2")
    model.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / WEIGHTS
    old = {}
    for name, value in read_weights_file(file).items():
        if name.startswith("encoder."):
            for part in ("q", "k", "v"):
                full = {"q": "query", "k": "key", "v": "value"}[part]
                name = name.replace(f"attention.{part}_proj.", f"attention.attention.{full}.")
            name = name.replace("attention.o_proj.", "attention.output.dense.")
        old[name] = value
    from safetensors.torch import save_file

    save_file(old, file, {"format": "pt"})
    assert_alike(imported(tmp_path / "theirs", tmp_path / "ours"), model)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_siglip_folder_is_read_whatever_transformers_wrote_it(tmp_path: Path, prefix: str) -> None:
    """diffusers itself builds this kind under transformers 4 only, so the folder is put together here."""
    from safetensors.torch import save_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    randomized_autoencoder("mae").save_pretrained(tmp_path / "theirs")
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "patch_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 256}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    held = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    file, config = tmp_path / "theirs" / WEIGHTS, tmp_path / "theirs" / "config.json"
    kept = {name: value for name, value in read_weights_file(file).items() if not name.startswith("encoder.")}
    encoder = {f"encoder.{prefix}{name}": value for name, value in held.items() if "post_layernorm" not in name}
    save_file({**kept, **encoder}, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "encoder_type": "siglip2"}))

    rae = imported(tmp_path / "theirs", tmp_path / "ours")
    pixels = rae.encoder.prepare(images(rae))
    with torch.no_grad():
        hidden = model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
        theirs = torch.nn.functional.layer_norm(hidden, (64,), eps=1e-6)
    torch.testing.assert_close(rae.encoder(images(rae)), theirs, atol=GATE, rtol=GATE)


def test_a_siglip_autoencoder_is_exported_or_refused_in_one_line(tmp_path: Path) -> None:
    rae = build_rae(make_stage1("siglip2", tmp_path)).eval()
    try:
        export_diffusers(rae, tmp_path / "export")
    except UserError as error:
        assert "encoder_type 'siglip2'" in str(error)
        assert not (tmp_path / "export").exists()
    else:
        assert_alike(rae, loaded(tmp_path / "export"))


def test_trained_positions_are_not_lost_silently(stage1: Stage1, tmp_path: Path) -> None:
    rae = build_rae(stage1).eval()
    with torch.no_grad():
        rae.decoder.decoder_pos_embed += 0.1 * torch.randn_like(rae.decoder.decoder_pos_embed)
    assert_alike(rae, to_diffusers(rae))  # in memory nothing is lost
    with pytest.raises(UserError, match="positions are up to"):
        export_diffusers(rae, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    export_diffusers(rae, tmp_path / "export", drop_positions=True)
    z = torch.randn(2, 64, 3, 3)
    with torch.no_grad():
        assert (loaded(tmp_path / "export").decode(z).sample - rae.decode(z)).abs().max() > 100 * GATE
        again = imported(tmp_path / "export", tmp_path / "again")
        assert (again.decode(z) - rae.decode(z)).abs().max() <= GATE


def test_the_class_token_s_trained_position_moves_into_the_token(stage1: Stage1, tmp_path: Path) -> None:
    rae = build_rae(stage1).eval()
    with torch.no_grad():
        rae.decoder.decoder_pos_embed[:, 0] += torch.randn(96)
    export_diffusers(rae, tmp_path / "export")
    assert_alike(rae, loaded(tmp_path / "export"))


def test_what_diffusers_cannot_express_is_refused(stage1: Stage1, tmp_path: Path) -> None:
    options = {**stage1.params.encoder_params, "normalize": False}
    with pytest.raises(UserError, match="normalize: false"):
        to_diffusers(build_rae(replace(stage1, params=replace(stage1.params, encoder_params=options))))
    with pytest.raises(UserError, match="without encoder"):
        to_diffusers(build_rae(stage1, need_encoder=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"encoder_type": "clip"}, "dinov2, mae or siglip2"),
        ({"reshape_to_2d": False}, "reshape_to_2d"),
        ({"decoder_hidden_size": 64}, "does not fit ViTDecoder"),
        ({"encoder_input_size": 48}, "latent statistics"),
        ({"encoder_patch_size": 0}, "encoder_patch_size is 0; expected a whole number"),
        ({"decoder_num_attention_heads": "4"}, "decoder_num_attention_heads is '4'"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    statistics = {"latents_mean": torch.randn(64, 2, 2), "latents_std": torch.ones(64, 2, 2)}
    randomized_autoencoder("mae", **statistics).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        import_diffusers(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_incomplete_folders_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    randomized_autoencoder("mae").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    file.write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is of a list"):
        import_diffusers(tmp_path, tmp_path / "ours")
    file.write_text(json.dumps({name: value for name, value in whole.items() if "encoder" not in name}))
    with pytest.raises(UserError, match=r"config\.json lacks encoder_type"):
        import_diffusers(tmp_path, tmp_path / "ours")
    file.write_text(json.dumps(whole))
    from safetensors.torch import save_file

    tensors = read_weights_file(tmp_path / WEIGHTS)
    save_file({n: v for n, v in tensors.items() if n != "_latents_std"}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="lacks _latents_std"):
        import_diffusers(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_positions_of_the_reference_are_those_of_diffusers_on_16_by_16_tokens() -> None:
    config = DecoderConfig(decoder_hidden_size=64, decoder_num_attention_heads=4, decoder_num_hidden_layers=1)
    model = randomized_autoencoder("mae", encoder_input_size=256)
    ours = ViTDecoder(replace(config, decoder_hidden_size=96)).decoder_pos_embed
    torch.testing.assert_close(model.decoder.decoder_pos_embed, ours.detach(), atol=1e-7, rtol=0)


def test_decoder_names_are_mapped_one_to_one(stage1: Stage1) -> None:
    names = list(build_rae(stage1, need_encoder=False).decoder.state_dict())
    theirs = [rename_to_diffusers(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [rename_from_diffusers(name) for name in theirs] == names
