"""Every tool that reads weights or statistics, given files that are wrong: status 2, one line, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.config import Config
from rae_fast.dit.registry import build_dit

ROOT = Path(__file__).parents[2]
DIT = {"hidden_size": [16, 24], "depth": [1, 1], "num_heads": [2, 2]}
LATENT = (32, 4, 4)  # of the shared tiny encoder
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "patch_size": 8,
}
# Runs each tool in turn in one process, as importing is what costs time; between them, a mark on both streams.
RUNNER = """
import json, runpy, sys
from rae_fast.errors import exit_cleanly
tools = {}
for number, (tool, *words) in enumerate(json.load(open(sys.argv[1]))):
    if tool not in tools:
        tools[tool] = runpy.run_path(tool, run_name="tool")["main"]
    sys.argv = [tool, *words]
    try:
        exit_cleanly(tools[tool])
    except SystemExit as end:
        print(f"@{number} {end.code}", file=sys.stderr, flush=True)
"""


class Code:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def spoil(folder: Path, whole: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Path]:
    """Files that are no state dict of the model that `whole` is of, by what is wrong with them."""
    folder.mkdir()
    first = next(iter(whole))
    contents: dict[str, Any] = {
        "torn": whole,
        "code": {"ema": whole, "extra": Code(folder / "code_ran")},
        "missing": {name: value for name, value in whole.items() if name != first},
        "surplus": {**whole, "surplus.weight": torch.zeros(1)},
        "shapes": other,
        "list": [1, 2, 3],
    }
    files = {name: folder / f"{name}.pt" for name in contents}
    for name, content in contents.items():
        torch.save(content, files[name])
    data = files["torn"].read_bytes()
    files["torn"].write_bytes(data[: len(data) // 2])
    return {**files, "absent": folder / "absent.pt"}


@dataclass
class Call:
    """A command of a tool, what its one line must say, and where it would have written."""

    words: list[str]
    said: str
    target: Path


@pytest.fixture(scope="module")
def calls(
    cache_config: Callable[..., Config], pristine_store: Path, tiny_encoder: Path, image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Call]:  # fmt: skip
    folder = tmp_path_factory.mktemp("bad")
    photos = image_folder / "circle"
    sizes = {"input_size": LATENT[1], "in_channels": LATENT[0], "num_classes": 3}
    whole = build_dit("DiTDH", {**DIT, **sizes}).state_dict()
    torch.save(whole, folder / "dit.pt")
    dits = spoil(folder / "dit", whole, build_dit("DiTDH", {**DIT, **sizes, "input_size": 8}).state_dict())
    (folder / "decoder.json").write_text(json.dumps(DECODER))
    config = replace(load_decoder_config(folder / "decoder.json"), hidden_size=LATENT[0], grid=LATENT[1])
    decoders = spoil(
        folder / "decoder", ViTDecoder(config).state_dict(), ViTDecoder(replace(config, grid=8)).state_dict()
    )
    torch.save(ViTDecoder(config).state_dict(), folder / "decoder.pt")
    statistics = spoil(folder / "statistics", {"mean": torch.zeros(LATENT), "var": torch.ones(LATENT)}, {})
    del statistics["missing"], statistics["surplus"]
    torch.save({"mean": torch.zeros(LATENT), "var": torch.ones(32, 8, 8)}, statistics["shapes"])
    statistics["weights"] = folder / "dit.pt"

    shared = [
        f"stage_1.params.encoder_params.dinov2_path={tiny_encoder}",
        "stage_1.params.encoder_input_size=32",
        "stage_1.params.decoder_patch_size=8",
        f"stage_1.params.decoder_config_path={folder / 'decoder.json'}",
        "stage_2.target=DiTDH",
        *(f"stage_2.params.{key}={value}" for key, value in DIT.items()),
        "runtime.device=cpu",
        "runtime.precision=fp32",
        "runtime.engine=ddp",
    ]
    sampled = [*shared, f"stage_1.params.pretrained_decoder_path={folder / 'decoder.pt'}"]
    ckpt, classes, decoder = "stage_2.ckpt=", "misc.num_classes=3", "stage_1.params.pretrained_decoder_path="
    guided = ["guidance.method=autoguidance", "guidance.scale=2", "guidance.guidance_model.target=DiTDH"]
    guided += [f"guidance.guidance_model.params={json.dumps(DIT)}", f"{ckpt}{folder / 'dit.pt'}", classes]
    made: list[Call] = []

    def add(tool: str, *words: str | Path, said: Path) -> None:
        target = folder / "out" / str(len(made))
        line = [str(ROOT / "tools" / f"{tool}.py"), *(str(word).replace("OUT", str(target)) for word in words)]
        made.append(Call(line, said.name, target))

    for file in dits.values():
        add("sample", "--folder", "OUT", "--count", "2", *sampled, classes, f"{ckpt}{file}", said=file)
        add(
            "train_dit", *shared, f"{ckpt}{file}", f"cache.path={pristine_store}", "logging.run_folder=OUT",
            "training.max_steps=1", "training.global_batch_size=2", said=file,
        )  # fmt: skip
    for kind in ("torn", "code", "list"):  # where the file itself says how many classes there are
        add("sample", "--folder", "OUT", "--count", "2", *sampled, f"{ckpt}{dits[kind]}", said=dits[kind])
    add(
        "sample", "--folder", "OUT", "--count", "2", *sampled, f"{ckpt}{folder / 'decoder.pt'}",
        said=folder / "decoder.pt",
    )  # fmt: skip
    for kind in ("torn", "shapes"):
        guide = f"guidance.guidance_model.ckpt={dits[kind]}"
        add("sample", "--folder", "OUT", "--count", "2", *sampled, *guided, guide, said=dits[kind])
    for kind, file in decoders.items():
        key = "stage_1.ckpt=" if kind == "missing" else decoder
        add("reconstruct", "--input", photos, "--folder", "OUT", *shared, f"{key}{file}", said=file)
        add(
            "evaluate", "reconstruction", "--originals", photos, "--out", "OUT", "--metrics", "psnr", *shared,
            f"{decoder}{file}", said=file,
        )  # fmt: skip
    for file in statistics.values():
        given = f"stage_1.params.normalization_stat_path={file}"
        add("reconstruct", "--input", photos, "--folder", "OUT", *sampled, given, said=file)
        add(
            "build_cache", *shared, f"data.source={image_folder}", "data.threads=1", "cache.path=OUT",
            f"cache.statistics={file}", said=file,
        )  # fmt: skip
    for kind in ("torn", "code", "list", "absent"):
        for what in ("dit", "decoder", "statistics", "pack"):
            if (kind, what) != ("list", "pack"):  # which keeps whatever a file holds
                add("convert", what, dits[kind], "OUT", said=dits[kind])
    return made


def test_every_tool_refuses_every_bad_file(calls: list[Call], tmp_path: Path) -> None:
    (tmp_path / "calls.json").write_text(json.dumps([call.words for call in calls]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path / "calls.json")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    rest, wrong = done.stderr, []
    for number, call in enumerate(calls):
        said, _, rest = rest.partition(f"@{number} ")
        status, _, rest = rest.partition("\n")
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if status != "2" or len(errors) != 1 or call.said not in errors[0] or call.target.exists():
            wrong.append((status, said[-400:], call.target.exists(), call.words[:1] + call.words[-2:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert not list(calls[0].target.parents[1].rglob("code_ran"))
