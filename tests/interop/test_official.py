"""Files of the reference, good and bad: whole or nothing, and a message that says what is wrong."""

from __future__ import annotations

import json
import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Stage1
from rae_fast.dit.registry import build_dit
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.interop import hub
from rae_fast.interop.archive import pack, unpack
from rae_fast.interop.official import (
    check_dit,
    convert_decoder,
    convert_dit,
    convert_statistics,
    load_dit_weights,
    read_dit_weights,
    save_content,
    save_weights,
)

SIZES = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": [16, 24],
    "depth": [2, 1],
    "num_heads": [2, 2],
    "num_classes": 5,
}
ROOT = Path(__file__).parents[2]


def dit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = build_dit("DiTDH", {**SIZES, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights() -> dict[str, Tensor]:
    return dict(dit().state_dict())


def average(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in tensors.items()}


@pytest.mark.parametrize("wrap", ["{}", "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, wrap: str) -> None:
    save_content(tmp_path / "a.pt", {wrap.format(name): value for name, value in weights().items()})
    assert same(read_dit_weights(tmp_path / "a.pt"), weights())


def test_prefixes_of_compiled_blocks_are_taken_off(tmp_path: Path) -> None:
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in weights().items()}
    save_content(tmp_path / "a.pt", wrapped)
    assert same(read_dit_weights(tmp_path / "a.pt"), weights())


@pytest.mark.parametrize("extra", [{}, {"step": 7, "epoch": 1, "optimizer": {"state": {}}, "scheduler": {"x": None}}])
def test_the_average_is_taken_unless_the_online_weights_are_asked_for(tmp_path: Path, extra: dict) -> None:
    online = weights()
    save_content(tmp_path / "a.pt", {"model": online, "ema": average(online), **extra})
    assert same(read_dit_weights(tmp_path / "a.pt"), average(online))
    assert same(read_dit_weights(tmp_path / "a.pt", "model"), online)


def test_a_checkpoint_without_average_gives_its_weights(tmp_path: Path) -> None:
    save_content(tmp_path / "a.pt", {"model": weights(), "step": 3})
    assert same(read_dit_weights(tmp_path / "a.pt"), weights())


def test_half_precision_weights_load_into_a_float32_model(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", weights(), "bf16")
    model = dit()
    load_dit_weights(model, tmp_path / "a.safetensors")
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert same(dict(model.state_dict()), {name: value.bfloat16().float() for name, value in weights().items()})


class Malice:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("malice_ran"),))


def test_pickled_code_is_refused_and_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights(), "extra": Malice()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="pickled code"):
        read_dit_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "malice_ran").exists()


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    save_content(tmp_path / "whole.pt", weights())
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "noise.pt").write_bytes(b"\x00\x01\x02" * 100)
    (tmp_path / "noise.safetensors").write_bytes(b"\x00\x01\x02" * 100)
    save_content(tmp_path / "list.pt", [1, 2])
    save_content(tmp_path / "counters.pt", {"step": 1})
    for name in ("torn.pt", "empty.pt", "noise.pt", "noise.safetensors", "list.pt", "counters.pt", "missing.pt"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_dit_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"num_classes": 7}, r"params: num_classes [^;]*\(8 configured, 6 in the file\)$"),
        ({"class_dropout_prob": 0.0}, "class_dropout_prob"),
        ({"input_size": 8}, "input_size"),
        ({"in_channels": 4}, "in_channels"),
        ({"depth": [3, 1]}, r"depth, in blocks \(4 configured, 3 in the file\)$"),
        ({"hidden_size": [32, 24], "depth": [3, 1]}, r"params: depth, [^)]*\), hidden_size \(32 configured[^)]*\)$"),
        ({"hidden_size": [16, 48]}, r"params: hidden_size \(48 configured, 24 in the file\)$"),
        ({"use_qknorm": True}, "use_qknorm"),
        ({"use_swiglu": False}, "use_swiglu"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_likely_cause(tmp_path: Path, changes: dict, cause: str) -> None:
    save_content(tmp_path / "a.pt", weights())
    model = dit(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=cause) as caught:
        load_dit_weights(model, tmp_path / "a.pt")
    assert "does not fit DiTDH" in str(caught.value)
    assert same(dict(model.state_dict()), before)


def test_the_first_three_differences_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    held = weights()
    for name in ("pos_embed", "t_embedder.W", "x_embedder.proj.bias", "x_embedder.proj.weight"):
        del held[name]
    save_content(tmp_path / "a.pt", {**held, "surplus": torch.zeros(1)})
    with pytest.raises(UserError) as caught:
        load_dit_weights(dit(), tmp_path / "a.pt")
    assert str(caught.value).count("is missing") == 3
    assert "and 2 more" in str(caught.value)


def test_files_of_the_other_stage_or_kind_are_recognised(tmp_path: Path) -> None:
    save_content(tmp_path / "stage1.pt", {"decoder.decoder_embed.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"stage_1\.ckpt"):
        load_dit_weights(dit(), tmp_path / "stage1.pt")
    lightning = build_dit("LightningDiT", {**SIZES, "hidden_size": 16, "depth": 2, "num_heads": 2})
    save_content(tmp_path / "lightning.pt", lightning.state_dict())
    with pytest.raises(UserError, match=r"stage_2\.target"):
        load_dit_weights(dit(), tmp_path / "lightning.pt")
    save_content(tmp_path / "dit.pt", weights())
    with pytest.raises(UserError, match="a decoder"):
        convert_decoder(tmp_path / "dit.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_tensors_that_share_memory_are_written_in_full(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    save_weights(tmp_path / "a.safetensors", {"a": base[:3], "b": base, "c": base.reshape(2, 3).T})
    save_content(tmp_path / "b.pt", {"a": base})
    convert_dit(tmp_path / "a.safetensors", tmp_path / "c.pt")
    assert torch.load(tmp_path / "c.pt", weights_only=True)["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for name in ("a.safetensors", "a.pt"):
        save_weights(tmp_path / name, {"a": torch.ones(1)})
    monkeypatch.setattr("safetensors.torch.save_file", fill_up)
    monkeypatch.setattr("torch.save", lambda content, file: fill_up(content, tmp_path / "half", None))
    with pytest.raises(UserError, match="No space left"):
        save_weights(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(OSError, match="No space left"):
        save_weights(tmp_path / "a.pt", {"a": torch.zeros(1)})
    (tmp_path / "half").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.safetensors"]
    assert all(read_dit_weights(tmp_path / name)["a"].item() == 1 for name in ("a.safetensors", "a.pt"))


def test_whole_checkpoints_survive_packing(tmp_path: Path) -> None:
    content = {
        "step": 5,
        "nothing": None,
        "lr": 1e-3,
        "names": ["a", ("b", 2)],
        "model": OrderedDict(w=torch.randn(2, 3), **{"a/b": torch.ones(1)}),
        "a": {"b": torch.zeros(1)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.95)}]},
    }
    save_content(tmp_path / "a.pt", content)
    assert pack(tmp_path / "a.pt", tmp_path / "a.safetensors") == 4
    unpack(tmp_path / "a.safetensors", tmp_path / "b.pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(back) == list(content)
    assert back["names"] == content["names"]
    assert back["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    assert list(back["optimizer"]["state"]) == [0, 1]
    assert torch.equal(back["model"]["w"], content["model"]["w"])
    assert back["model"]["a/b"].item() == 1
    assert back["a"]["b"].item() == 0


def test_weights_alone_are_no_archive(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    with pytest.raises(UserError, match="weights only"):
        unpack(tmp_path / "a.safetensors", tmp_path / "b.pt")


def test_a_stage1_checkpoint_gives_the_autoencoder_its_decoder(stage1: Stage1, tmp_path: Path) -> None:
    decoder = torch.load(stage1.params.pretrained_decoder_path, weights_only=True)
    held = {f"decoder.{name}": value + 1 for name, value in decoder.items()}
    held["encoder.model.some.name.of.another.version"] = torch.zeros(1)
    save_content(tmp_path / "stage1.pt", {"step": 1, "model": {}, "ema": held})
    rae = build_rae(replace(stage1, ckpt=str(tmp_path / "stage1.pt")), need_encoder=False)
    assert same(dict(rae.decoder.state_dict()), {name: value + 1 for name, value in decoder.items()})


def test_statistics_without_either_entry_are_refused(tmp_path: Path) -> None:
    save_content(tmp_path / "a.pt", {"running_mean": torch.zeros(2)})
    with pytest.raises(UserError, match="running_mean"):
        convert_statistics(tmp_path / "a.pt", tmp_path / "b.pt")


# --- the released collection ----------------------------------------------------------------------------------------

FILE = "stats/dinov2/wReg_base/imagenet1k/stat.pt"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_file_and_its_place_are_named(tmp_path: Path) -> None:
    for revision in (None, "0" * 40):
        with pytest.raises(UserError) as caught:
            hub.fetch(FILE, tmp_path / "models", revision)
        assert str(tmp_path / "models" / FILE) in str(caught.value)
        assert "hf download nyu-visionx/RAE-collections" in str(caught.value)
        assert (f"--revision {revision}" in str(caught.value)) == (revision is not None)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "models").exists()


def test_without_a_name_server_nothing_is_tried_again_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.model_info", no_network)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("a download was begun"))
    with pytest.raises(UserError, match="Name or service not known"):
        hub.fetch(FILE, tmp_path / "models", "0" * 40)
    assert not (tmp_path / "models").exists()


def test_a_released_file_that_is_not_there_says_how_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As official configs name it, relative to the folder of the command."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"tools/convert\.py fetch models/{FILE}$"):
        convert_statistics(f"models/{FILE}", "out.pt")
    with pytest.raises(UserError, match=r"weights$"):
        read_dit_weights(tmp_path / "mine.pt")


@pytest.mark.usefixtures("offline")
def test_a_file_in_its_place_needs_no_network(tmp_path: Path) -> None:
    target = tmp_path / FILE
    target.parent.mkdir(parents=True)
    target.write_bytes(b"here")
    assert hub.fetch(FILE, tmp_path) == target
    assert hub.fetch(f"models/{FILE}", tmp_path) == target


def test_the_first_download_pins_the_revision_of_all_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str, *, revision: str, local_dir: Path, **_: object) -> None:
        asked.append((file, revision))
        (Path(local_dir) / file).parent.mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / file).write_text(file)

    class Info:
        sha = "a" * 40

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.model_info", lambda *_, **__: Info)
    hub.fetch("one.pt", tmp_path)
    Info.sha = "b" * 40
    hub.fetch("two.pt", tmp_path)
    assert asked == [("one.pt", "a" * 40), ("two.pt", "a" * 40)]
    noted = json.loads((tmp_path / hub.PINNED).read_text())
    assert noted["revision"] == "a" * 40
    assert set(noted["files"]) == {"one.pt", "two.pt"}
    with pytest.raises(UserError, match="pins"):
        hub.fetch("three.pt", tmp_path, "b" * 40)


# --- the tool -------------------------------------------------------------------------------------------------------


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The tool's exit status, as if it had been started with these arguments."""
    tool = runpy.run_path(str(ROOT / "tools" / "convert.py"), run_name="convert")

    def start(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            exit_cleanly(tool["main"])
        return int(ended.value.code or 0)

    return start


def config_file(path: Path, **changes: object) -> Path:
    section = {"target": "stage2.models.DDT.DiTwDDTHead", "params": {**SIZES, **changes}}
    path.write_text(yaml.safe_dump({"stage_2": section, "misc": {"latent_size": [8, 4, 4]}, **STAGE_1}))
    return path


STAGE_1 = {"stage_1": {"params": {"encoder_cls": "TimmViT", "encoder_input_size": 64}}}


def test_the_tool_checks_weights_against_a_config_before_it_writes(
    tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_content(tmp_path / "a.pt", {"model": weights(), "ema": average(weights())})
    fits, other = config_file(tmp_path / "fits.yaml"), config_file(tmp_path / "other.yaml", num_classes=9)
    assert convert("dit", tmp_path / "a.pt", tmp_path / "b.safetensors", "--config", fits) == 0
    assert same(read_dit_weights(tmp_path / "b.safetensors"), average(weights()))
    assert capsys.readouterr().err == ""
    assert convert("dit", tmp_path / "a.pt", tmp_path / "c.pt", "--config", other) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "num_classes" in said
    assert not (tmp_path / "c.pt").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("dit", "torn.pt", "b.pt"),
        ("decoder", "missing.pt", "b.pt"),
        ("dit", "torn.pt", "b.pt", "--dtype", "fp8"),
        ("statistics", "torn.pt", "b.pt"),
        ("pack", "torn.pt", "b.pt"),
        ("unpack", "torn.pt", "b.pt"),
        ("run", ".", "b.pt"),
        ("from-diffusers", ".", "b"),
        ("no-such-kind",),
    ],
)
def test_bad_input_ends_the_tool_with_status_2_and_one_line(
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torn.pt").write_bytes(b"PK\x03\x04 torn")
    assert convert(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["torn.pt"]


def test_check_does_not_build_the_model_in_memory(tmp_path: Path) -> None:
    save_content(tmp_path / "a.pt", weights())
    check_dit(tmp_path / "a.pt", config_file(tmp_path / "config.yaml"))
