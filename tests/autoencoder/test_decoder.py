"""The ViT decoder: configuration files, exact derivatives, grids, and loading whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rae_fast.autoencoder.decoder import (
    DecoderConfig,
    ViTDecoder,
    load_decoder_config,
    load_decoder_weights,
    named_decoder,
)
from rae_fast.errors import UserError
from rae_fast.patches import unpatchify

TINY = DecoderConfig(
    hidden_size=6,
    grid=3,
    patch_size=2,
    decoder_hidden_size=8,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=12,
)


def tiny() -> ViTDecoder:
    torch.manual_seed(0)
    decoder = ViTDecoder(TINY)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


def test_gradients_are_exact_in_float64() -> None:
    decoder = tiny().double().requires_grad_(True)
    tokens = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in decoder.named_parameters()]

    def pixels(tokens: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        values = dict(zip(names, parameters, strict=True))
        return decoder.unpatchify(torch.func.functional_call(decoder, values, (tokens,)))

    inputs = (tokens, *decoder.parameters())
    assert torch.autograd.gradcheck(pixels, inputs, fast_mode=True)


def test_activation_checkpointing_changes_no_number() -> None:
    decoder = tiny().requires_grad_(True)
    tokens, results = torch.randn(2, 9, 6), []
    for decoder.activation_checkpointing in (False, True):
        decoder.zero_grad()
        decoder(tokens).square().mean().backward()
        results.append([parameter.grad.clone() for parameter in decoder.parameters()])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def test_decoder_compiles_into_one_graph() -> None:
    decoder, tokens = tiny(), torch.randn(2, 9, 6)
    graph = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(tokens), decoder(tokens))


def test_pixels_of_a_patch_stay_together_in_row_major_order() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    patches = torch.stack(
        [
            pixels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(0, 2, 3, 1).flatten(1)
            for row in range(2)
            for column in range(2)
        ],
        dim=1,
    )
    assert torch.equal(unpatchify(patches, patch_size=2, grid=2), pixels)


def test_last_layer_is_the_map_to_pixels() -> None:
    decoder = tiny()
    assert decoder.last_layer is decoder.decoder_pred.weight


def test_tokens_that_form_no_square_are_refused() -> None:
    with pytest.raises(UserError, match="8 tokens"):
        tiny()(torch.randn(1, 8, 6))


def test_config_with_numbers_as_strings_reads_like_the_reference_s(tmp_path: Path) -> None:
    content = {
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": 1152,
        "decoder_num_hidden_layers": 28,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
        "patch_size": "14",
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "num_channels": "3",
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    for path in (tmp_path, str(tmp_path / "config.json")):
        assert load_decoder_config(path) == replace(named_decoder("ViTXL"), patch_size=14)


def test_sizes_are_known_by_the_reference_s_folder_names() -> None:
    assert load_decoder_config("configs/decoder/absent/ViTB") == named_decoder("ViTB")
    assert named_decoder("ViTL").decoder_hidden_size == 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"decoder_num_hidden_layers": 2}, "no decoder_hidden_size"),
        ({"decoder_hidden_size": "wide", "decoder_num_hidden_layers": 2}, "decoder_hidden_size is 'wide'"),
        ({"decoder_hidden_size": 30, "decoder_num_hidden_layers": 2}, "decoder_hidden_size 30"),
        ({"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_configs_that_make_no_decoder_are_refused(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_decoder_config(tmp_path)


def test_absent_config_is_refused_with_the_known_sizes() -> None:
    with pytest.raises(UserError, match=r"no/where.*ViTB, ViTL, ViTXL"):
        load_decoder_config("no/where")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_load_from_both_formats(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    source, target = tiny(), ViTDecoder(TINY)
    path = tmp_path / f"model{suffix}"
    (torch.save if suffix == ".pt" else save_file)(source.state_dict(), path)
    load_decoder_weights(target, path)
    tokens = torch.randn(1, 9, 6)
    assert torch.equal(target(tokens), source(tokens))


def test_weights_that_do_not_fit_name_the_first_differences_and_change_nothing(tmp_path: Path) -> None:
    decoder = tiny()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    state = dict(ViTDecoder(replace(TINY, decoder_num_hidden_layers=1)).state_dict())
    state["decoder_embed.weight"] = torch.zeros(8, 7)
    state["head.extra"] = torch.zeros(1)
    path = tmp_path / "model.pt"
    torch.save(state, path)
    with pytest.raises(UserError, match=r"decoder_layers\.1\..* is missing; .* and \d+ more.*decoder_config_path"):
        load_decoder_weights(decoder, path)
    torch.save({**before, "decoder_embed.weight": torch.zeros(8, 7)}, path)
    with pytest.raises(UserError, match=r"decoder_embed\.weight is \[8, 7\], not \[8, 6\]"):
        load_decoder_weights(decoder, path)
    torch.save({**before, "extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="extra is surplus"):
        load_decoder_weights(decoder, path)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Command:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple:
        return (print, ("code in a pickle ran",))


def test_torn_files_and_pickled_code_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    decoder, path = tiny(), tmp_path / "model.pt"
    torch.save(decoder.state_dict(), path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"model\.pt cannot be read"):
        load_decoder_weights(decoder, path)
    torch.save({"decoder_embed.weight": Command()}, path)
    with pytest.raises(UserError, match="never run"):
        load_decoder_weights(decoder, path)
    assert "code in a pickle ran" not in capfd.readouterr().out
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        load_decoder_weights(decoder, tmp_path / "absent.pt")
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds list"):
        load_decoder_weights(decoder, path)
