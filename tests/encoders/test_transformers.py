"""Frozen encoders of every family of transformers, on small models with random weights written by the test."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rae_fast.config import CHOICES
from rae_fast.encoders import FrozenEncoder, build_encoder, encoder_facts
from rae_fast.encoders.registry import ENCODERS
from rae_fast.errors import UserError
from rae_fast.provenance import sha256_file

WIDTH, BLOCKS = 24, 3
SHARED = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 3}
# Encoder class, input size for a 4 x 4 grid, prefix tokens, and how to make the model.
FAMILIES: dict[str, tuple[str, int, int, Callable[[], nn.Module]]] = {
    "dinov2": (
        "Dinov2withNorm",
        56,
        1,
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHARED, image_size=70, patch_size=14)),
    ),
    "dinov2_with_registers": (
        "Dinov2withNorm",
        56,
        5,
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SHARED, image_size=70, patch_size=14, num_register_tokens=4)
        ),
    ),
    "dinov3": (
        "DINOv3",
        64,
        3,
        lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(
                **SHARED, intermediate_size=48, image_size=64, patch_size=16, num_register_tokens=2
            )
        ),
    ),
    "mae": (
        "MAEwNorm",
        64,
        1,
        lambda: transformers.ViTMAEModel(
            transformers.ViTMAEConfig(**SHARED, intermediate_size=48, image_size=48, patch_size=16)
        ),
    ),
    "siglip": (
        "SigLIP2wNorm",
        64,
        0,
        lambda: transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**SHARED, intermediate_size=48, image_size=48, patch_size=16)
        ),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in Hugging Face's layout for each family."""
    written = {}
    for name, (_, _, _, make) in FAMILIES.items():
        torch.manual_seed(0)
        model = make()
        for key, parameter in model.named_parameters():
            # Blocks must change the stream visibly: layer scales of one.
            nn.init.constant_(parameter, 1.0) if "lambda1" in key else nn.init.normal_(parameter, std=0.2)
        written[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(written[name])
        processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
        (written[name] / "preprocessor_config.json").write_text(json.dumps(processor))
    return written


def encoder(folders: dict[str, Path], name: str, **params: Any) -> FrozenEncoder:
    encoder_cls, size, _, _ = FAMILIES[name]
    return build_encoder(encoder_cls, input_size=size, params={"path": str(folders[name]), **params})


def images(size: int = 50) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, size, size)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_patches_normalized_without_affine(folders: dict[str, Path], name: str) -> None:
    ours = encoder(folders, name)
    _, size, prefix, _ = FAMILIES[name]
    tokens = ours(images())
    assert tokens.shape == (2, 16, WIDTH)
    assert (ours.hidden_size, ours.grid, ours.input_size) == (WIDTH, 4, size)
    assert ours.prefix_tokens == prefix
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 16), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_affine_option_keeps_the_model_s_own_last_norm(folders: dict[str, Path], name: str) -> None:
    """With it, tokens are what transformers itself returns."""
    ours = encoder(folders, name, normalize=False)
    pixels = ours.prepare(images())
    own = FAMILIES[name][3]().from_pretrained(folders[name], **({"mask_ratio": 0.0} if name == "mae" else {})).eval()
    arguments = {"interpolate_pos_encoding": True} if name in ("mae", "siglip") else {}
    if name == "mae":
        arguments["noise"] = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        theirs = own(pixel_values=pixels, **arguments).last_hidden_state[:, ours.prefix_tokens :]
    torch.testing.assert_close(ours(images()), theirs, atol=1e-5, rtol=1e-5)
    assert (ours(images()) - encoder(folders, name)(images())).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_several_layers_are_the_mean_of_their_normalized_tokens(folders: dict[str, Path], name: str) -> None:
    single = [encoder(folders, name, layers=[layer])(images()) for layer in range(BLOCKS)]
    torch.testing.assert_close(single[-1], encoder(folders, name)(images()), atol=1e-5, rtol=1e-5)
    assert (single[0] - single[1]).abs().max() > 0.1
    mean = encoder(folders, name, layers=[2, 0])(images())
    torch.testing.assert_close(mean, (single[0] + single[2]) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_in_row_major_order_and_unshuffled(folders: dict[str, Path], name: str) -> None:
    """A change in one patch changes that patch's token the most, in a model of nearly no attention."""
    ours = encoder(folders, name)
    for key, parameter in ours.model.named_parameters():
        if "o_proj" in key or "out_proj" in key or "attention.output" in key:
            parameter.mul_(1e-3)
    _, size, _, _ = FAMILIES[name]
    plain = images(size)
    changed = plain.clone()
    patch = size // 4
    changed[:, :, 2 * patch : 3 * patch, patch : 2 * patch] = (
        1 - changed[:, :, 2 * patch : 3 * patch, patch : 2 * patch]
    )
    difference = (ours(changed) - ours(plain)).norm(dim=-1)
    assert difference.argmax(dim=1).tolist() == [9, 9]


def test_images_are_resized_and_standardized_as_the_reference_does(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "dinov2")
    resized = nn.functional.interpolate(images(), size=(56, 56), mode="bicubic", align_corners=False)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    expected = (resized - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ours.prepare(images()), expected)
    native = (images(56) - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ours.prepare(images(56)), native)


def test_image_statistics_of_another_folder_or_of_the_options_win(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    params = {"path": str(folders["mae"])}
    other = build_encoder("MAEwNorm", input_size=64, params=params, config_path=str(tmp_path))
    assert (other.image_mean, other.image_std) == ((0, 0, 0), (1, 1, 1))
    given = encoder(folders, "mae", image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3])
    assert (given.image_mean, given.image_std) == ((0.1, 0.2, 0.3), (1, 2, 3))


def test_encoder_stays_frozen_and_in_evaluation_mode(folders: dict[str, Path]) -> None:
    ours = nn.Sequential(encoder(folders, "dinov2")).train()
    assert not ours[0].training
    assert not ours[0].model.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not ours(images().requires_grad_(True)).requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_encoder_gives_float32_tokens_close_to_the_exact_ones(folders: dict[str, Path], name: str) -> None:
    exact, rough = encoder(folders, name)(images()), encoder(folders, name, dtype="bf16")(images())
    assert rough.dtype == torch.float32
    assert ((rough - exact).norm() / exact.norm()) < 0.1


def test_compiled_encoder_gives_equal_tokens(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    ours = encoder(folders, "dinov2", compile=True)
    assert compiled == ["Dinov2Model"]
    graph = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(graph(images(56)), ours(images(56)), atol=1e-5, rtol=1e-5)


def test_identity_names_whatever_changes_the_tokens(folders: dict[str, Path]) -> None:
    identity = encoder(folders, "dinov2").identity()
    assert identity == {
        "name": str(folders["dinov2"]),
        "revision": None,
        "weights_sha256": sha256_file(folders["dinov2"] / "model.safetensors"),
        "layers": [BLOCKS - 1],
        "final_norm": "layernorm",
        "input_size": 56,
        "resize": "bicubic, align_corners=False, no antialias",
    }
    changed = encoder(folders, "dinov2", layers=[0], normalize=False, revision="main").identity()
    assert (changed["layers"], changed["final_norm"], changed["revision"]) == ([0], "layernorm_affine", "main")


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_without_weights_are_those_of_the_encoder(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folders[name] / file).read_bytes())
    assert encoder_facts(FAMILIES[name][0], params={"path": str(tmp_path)}) == encoder(folders, name).facts


@pytest.mark.parametrize(
    ("encoder_cls", "name", "expected"),
    [
        ("Dinov2withNorm", "facebook/dinov2-with-registers-base", (768, 14, 0.485)),
        ("MAEwNorm", "facebook/vit-mae-base", (768, 16, 0.485)),
        ("SigLIP2wNorm", "google/siglip2-base-patch16-256", (768, 16, 0.5)),
    ],
)
def test_facts_of_published_encoders_need_no_file(
    encoder_cls: str, name: str, expected: tuple[int, int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rae_fast.encoders.registry.cached_folder", lambda name, revision: None)
    facts = encoder_facts(encoder_cls, params={"model_name": name}, config_path=name)
    assert (facts.hidden_size, facts.patch_size, facts.image_mean[0]) == expected


def test_only_square_rgb_images_are_encoded(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "dinov2")
    with pytest.raises(UserError, match=r"3 channels, 56 x 70 pixels.*square"):
        ours(torch.rand(1, 3, 56, 70))
    with pytest.raises(UserError, match="1 channels"):
        ours(torch.rand(1, 1, 56, 56))


def test_absent_encoder_is_refused_with_what_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import errors

    def offline(name: str, **arguments: Any) -> str:
        raise errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"some/model.*at v1.*model\.safetensors.*hf download some/model.*hub"):
        build_encoder("Dinov2withNorm", input_size=56, params={"dinov2_path": "some/model", "revision": "v1"})
    with pytest.raises(UserError, match=r"has no config\.json"):
        build_encoder("Dinov2withNorm", input_size=56, params={"dinov2_path": str(tmp_path)})


def test_hub_model_is_known_by_its_commit(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folders["dinov2"].iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **arguments: str(snapshot))
    identity = build_encoder("Dinov2withNorm", input_size=56, params={"dinov2_path": "some/model"}).identity()
    assert (identity["name"], identity["revision"]) == ("some/model", commit)


def test_incomplete_truncated_and_foreign_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folders["dinov2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    build = {"input_size": 56, "params": {"path": str(tmp_path)}}
    removed = next(name for name in tensors if "fc1.weight" in name)
    save_file({k: v for k, v in tensors.items() if k != removed}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors.*fc1\.weight"):
        build_encoder("Dinov2withNorm", **build)
    weights.write_bytes((folders["dinov2"] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        build_encoder("Dinov2withNorm", **build)
    save_file({**tensors, removed: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        build_encoder("Dinov2withNorm", **build)
    with pytest.raises(UserError, match=r"model_type is 'dinov2'.*vit_mae.*encoder_cls"):
        build_encoder("MAEwNorm", **build)


@pytest.mark.parametrize(
    ("encoder_cls", "size", "params", "message"),
    [
        ("Dinov2WithNorm", 56, {}, "did you mean 'Dinov2withNorm'"),
        ("Dinov2withNorm", 60, {}, "encoder_input_size is 60.*multiple of the encoder's patch size 14"),
        ("Dinov2withNorm", 56, {"layer": [1]}, "did you mean 'layers'"),
        ("Dinov2withNorm", 56, {"layers": [0, 3]}, r"layers is \[0, 3\].*0 to 2"),
        ("Dinov2withNorm", 56, {"dtype": "fp8"}, "dtype is 'fp8'"),
        ("Dinov2withNorm", 56, {"model_name": "twice"}, "names 2 models"),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_key(
    folders: dict[str, Path], encoder_cls: str, size: int, params: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(encoder_cls, input_size=size, params={"path": str(folders["dinov2"]), **params})


def test_the_names_of_the_schema_are_those_of_the_encoders() -> None:
    assert set(CHOICES["stage_1.params.encoder_cls"]) == set(ENCODERS)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_written_out_agrees_with_the_fused_one(folders: dict[str, Path], name: str) -> None:
    fused, plain = encoder(folders, name), encoder(folders, name, attention="eager")
    assert fused.model.config._attn_implementation == "sdpa"
    assert plain.model.config._attn_implementation == "eager"
    torch.testing.assert_close(fused(images()), plain(images()), atol=1e-4, rtol=1e-4)


def test_attention_that_is_not_installed_is_refused_with_the_key(folders: dict[str, Path]) -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here")
    with pytest.raises(UserError, match=r"encoder_params\.attention is 'flash_attention_2'.*set it to sdpa"):
        encoder(folders, "dinov2", attention="flash_attention_2")
    with pytest.raises(UserError, match="attentoin"):
        encoder(folders, "dinov2", attention="attentoin")


def test_without_a_network_the_key_the_model_and_the_cache_are_named(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    program = (
        "from rae_fast.encoders import build_encoder, encoder_facts\n"
        "from rae_fast.errors import UserError\n"
        "import sys\n"
        "folder = sys.argv[1]\n"
        "absent = {'dinov2_path': 'some/model', 'revision': 'v1'}\n"
        "for params, place in ((absent, None), ({'path': folder}, 'some/it')):\n"
        "    try:\n"
        "        build_encoder('Dinov2withNorm', input_size=56, params=params, config_path=place)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SHARED, image_size=70, patch_size=14))
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    model_line, processor_line = done.stdout.splitlines()
    assert "stage_1.params.encoder_params: some/model at v1" in model_line
    assert "hf download some/model" in model_line and str(tmp_path) in model_line
    assert "stage_1.params.encoder_config_path: some/it" in processor_line


def test_official_options_are_accepted(folders: dict[str, Path]) -> None:
    params = {"model_name": str(folders["siglip"]), "num_tokens": 256}
    assert build_encoder("SigLIP2wNorm", input_size=64, params=params)(images()).shape == (2, 16, WIDTH)


def test_folder_without_image_processor_is_refused_with_what_to_set(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folders["mae"] / file).read_bytes())
    with pytest.raises(UserError, match=r"preprocessor_config\.json.*image_mean and image_std"):
        build_encoder("MAEwNorm", input_size=64, params={"path": str(tmp_path)})
