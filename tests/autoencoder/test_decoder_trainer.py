"""Decoder training as a whole: it learns, it resumes to the same bytes, ranks do not matter, bad input is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path

import pytest
import torch

import rae_fast
from rae_fast.autoencoder.assembly import disc_scheduler
from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder, load_decoder_weights
from rae_fast.autoencoder.rae import build_rae
from rae_fast.autoencoder.trainer import DecoderRun, train_decoder
from rae_fast.config import Config, GanLoss, Scheduler
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.patches import sincos_table
from rae_fast.runtime import Ranks
from rae_fast.training.monitor import read_log

CPU = torch.device("cpu")
TOOL = Path(rae_fast.__file__).parents[1] / "tools" / "train_decoder.py"
FLOAT64 = Path(__file__).with_name("float64_run.py")
LOGS = ("log.jsonl", "eval.jsonl")
EXPORTS = ("export/model.safetensors",)
MakeConfig = Callable[..., Config]


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*LOGS, *EXPORTS)}


def stopped_at(config: Config, step: int) -> None:
    """Train, and be told to stop while `step` is under way, as by SIGTERM."""
    run = DecoderRun(config, Ranks(), CPU, Path(config.logging.run_folder))

    class Signals:
        @property
        def requested(self) -> bool:
            return run.step >= step - 1

    result = run.train(Signals())
    run.close()
    assert not result["finished"] and step <= result["step"] < result["steps"]


@pytest.fixture(scope="module")
def trained(decoder_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = decoder_config(folder, "training.max_steps=40", "eval.eval_interval=10", "eval.eval_model=true")
    return folder, train_decoder(config)


def test_held_out_psnr_rises_and_every_figure_is_finite(trained: tuple[Path, dict]) -> None:
    folder, result = trained
    averaged = [line["psnr_db"] for line in read_log(folder / "eval.jsonl") if line["weights"] == "ema"]
    assert len(averaged) == 4 and averaged == sorted(averaged) and averaged[-1] > averaged[0] + 0.5
    assert result["psnr_db"] == averaged[-1] and result["finished"]
    online = [line["psnr_db"] for line in read_log(folder / "eval.jsonl") if line["weights"] == "online"]
    assert len(online) == 4 and online != averaged
    lines = read_log(folder / "log.jsonl")
    assert all(isfinite(value) for line in lines for value in line.values() if value is not None)
    assert lines[-1]["l1"] < lines[0]["l1"]


def test_parts_of_the_game_start_when_the_config_says(trained: tuple[Path, dict]) -> None:
    # Five steps make an epoch: the discriminator learns from step 2 on, the decoder hears of it from step 4 on.
    first, second, third, *_ = read_log(trained[0] / "log.jsonl")
    assert first["disc_loss"] is None and first["adaptive_weight"] is None
    assert second["disc_loss"] is not None and second["adaptive_weight"] is None
    assert third["adaptive_weight"] > 0 and 0 <= third["disc_accuracy"] <= 1


def test_export_is_a_released_decoder_file_and_a_grid_is_drawn(trained: tuple[Path, dict]) -> None:
    folder, result = trained
    run_config = (folder / "config.yaml").read_text()
    assert "noise_tau: 0.3" in run_config and (folder / "manifest.json").is_file()
    assert (folder / "samples" / "step-0000040.png").is_file()
    weights = torch.load(result["export"], weights_only=True)
    sizes = DecoderConfig(
        hidden_size=32, grid=4, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=64,
    )  # fmt: skip
    decoder = ViTDecoder(sizes)
    load_decoder_weights(decoder, result["export"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.state_dict().items())
    assert not torch.equal(weights["decoder_pos_embed"], ViTDecoder(sizes).decoder_pos_embed)  # trained, as all else
    complete = build_rae(load_config(folder / "export" / "stage_1.yaml").stage_1)
    assert complete.encoder is not None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in complete.decoder.state_dict().items())


def test_positions_stay_where_diffusers_has_them_if_asked(decoder_config: MakeConfig, tmp_path: Path) -> None:
    settings = ("training.max_steps=2", "stage_1.params.train_positions=false", "eval.num_images=2")
    result = train_decoder(decoder_config(tmp_path / "run", *settings))
    weights = torch.load(result["export"], weights_only=True)
    assert torch.equal(weights["decoder_pos_embed"][:, 1:], sincos_table(32, 4))
    assert weights["trainable_cls_token"].abs().max() > 0


def test_bfloat16_trains_both_players(trained: tuple[Path, dict], decoder_config: MakeConfig, tmp_path: Path) -> None:
    settings = ("training.max_steps=8", "runtime.precision=bf16", "eval.num_images=4")
    train_decoder(decoder_config(tmp_path / "run", *settings))
    exact, rough = (read_log(folder / "log.jsonl")[:4] for folder in (trained[0], tmp_path / "run"))
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours["skipped"] == 0 and ours["l1"] == pytest.approx(theirs["l1"], rel=0.1)
    assert rough[-1]["disc_loss"] == pytest.approx(exact[-1]["disc_loss"], rel=0.2)
    assert rough[-1]["adaptive_weight"] > 0


def test_stopped_run_resumes_to_the_same_bytes(decoder_config: MakeConfig, tmp_path: Path) -> None:
    settings = ("training.max_steps=12", "eval.eval_interval=4", "training.checkpoint_every=3")
    train_decoder(decoder_config(tmp_path / "whole", *settings))
    broken = decoder_config(tmp_path / "broken", *settings)
    stopped_at(broken, 3)
    stopped_at(broken, 8)
    assert train_decoder(broken)["finished"]
    assert written(tmp_path / "broken") == written(tmp_path / "whole")
    assert train_decoder(broken)["step"] == 12  # a finished run stays as it is
    assert written(tmp_path / "broken") == written(tmp_path / "whole")


def launch(script: Path, ranks: int, *arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen]) -> str:
    outputs = [process.communicate(timeout=800)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs[0]


@pytest.fixture
def empty_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "decoder.yaml"
    path.write_text("{}\n")
    return path


def assert_same_figures(ours: list[dict], theirs: list[dict], gate: float) -> None:
    assert len(ours) == len(theirs) > 0
    for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        assert one.keys() == two.keys()
        for key, value in one.items():
            expected = pytest.approx(value, rel=gate, abs=gate * 1e-3) if isinstance(value, float) else value
            assert two[key] == expected, (number, key)


@pytest.mark.timeout(900)
def test_two_deepspeed_ranks_see_the_losses_of_one(
    decoder_config: MakeConfig, decoder_overrides: list[str], empty_yaml: Path, tmp_path: Path
) -> None:
    # The same micro-batches, in one process one after the other: then even rounding is the same.
    settings = ["training.max_steps=10", "training.batch_size=4", "training.log_interval=1", "eval.eval_interval=10"]
    settings += ["eval.metrics=[psnr,ssim,rfid]", "eval.features=encoder"]
    train_decoder(decoder_config(tmp_path / "one", *settings))
    pair = [*decoder_overrides, *settings, "runtime.engine=deepspeed", f"logging.run_folder={tmp_path / 'two'}"]
    finish(launch(TOOL, 2, "--config", str(empty_yaml), *pair))
    one, two = (read_log(tmp_path / run / "log.jsonl") for run in ("one", "two"))
    assert one[-1]["adaptive_weight"] > 0
    assert_same_figures(one, two, 1e-5)
    # Held-out images are decoded in other batches.
    assert_same_figures(*(read_log(tmp_path / run / "eval.jsonl") for run in ("one", "two")), 1e-5)


@pytest.mark.timeout(900)
def test_a_step_depends_neither_on_ranks_nor_on_the_size_of_micro_batches(
    decoder_overrides: list[str], tmp_path: Path
) -> None:
    # In float32 other micro-batches round otherwise, and hinges and the 8-bit grid of the fakes turn that into steps;
    # in float64 nothing may be left.
    figures = []
    for name, ranks, settings in (("whole", 1, []), ("cut", 2, ["training.batch_size=2"])):
        target = tmp_path / f"{name}.json"
        run = ["training.max_steps=10", f"logging.run_folder={tmp_path / name}", *settings]
        finish(launch(FLOAT64, ranks, str(target), *decoder_overrides, *run))
        figures.append(json.loads(target.read_text()))
    assert figures[0][-1]["adversarial/count"] == 1 and figures[0][-1]["disc_loss"] > 0
    assert_same_figures(*figures, 1e-9)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(decoder_overrides: list[str], empty_yaml: Path, tmp_path: Path) -> None:
    settings = ["training.max_steps=60", "eval.eval_interval=20", "training.checkpoint_every=5"]
    arguments = ["--config", str(empty_yaml), *decoder_overrides, *settings]
    # Launched as well: sums come out the same for the same number of threads only.
    finish(launch(TOOL, 1, *arguments, f"logging.run_folder={tmp_path / 'whole'}"))
    folder = tmp_path / "killed"
    arguments.append(f"logging.run_folder={folder}")
    for wanted in (10, 35):
        (process,) = launch(TOOL, 1, *arguments)
        while process.poll() is None and not any(
            int(path.name[5:]) >= wanted for path in (folder / "checkpoints").glob("step-*")
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(launch(TOOL, 1, *arguments))
    assert written(folder) == written(tmp_path / "whole")


def test_evaluation_is_without_latent_noise(decoder_config: MakeConfig, tmp_path: Path) -> None:
    measured = []
    for tau in (0.0, 5.0):
        config = decoder_config(tmp_path / f"tau{tau}", f"stage_1.params.noise_tau={tau}", "gan.loss.disc_weight=0")
        run = DecoderRun(config, Ranks(), CPU, Path(config.logging.run_folder))
        run.evaluate()
        measured.append(run.last_evaluation)
        run.close()
    assert measured[0] == measured[1] and measured[0]["psnr_db"] > 0


def test_lpips_is_refused_by_name_where_vgg_is_missing(
    decoder_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="vgg16"):
        train_decoder(decoder_config(tmp_path / "run", "gan.loss.perceptual=lpips"))


def test_stores_that_do_not_fit_are_refused(decoder_config: MakeConfig, balanced_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pixels"):
        train_decoder(decoder_config(tmp_path / "run", f"cache.path={balanced_store}"))
    with pytest.raises(UserError, match="image_size"):
        train_decoder(decoder_config(tmp_path / "run", "stage_1.params.decoder_patch_size=16"))
    with pytest.raises(UserError, match="latent_shape"):
        train_decoder(decoder_config(tmp_path / "run", "stage_1.params.encoder_input_size=64"))
    with pytest.raises(UserError, match="psnr"):
        train_decoder(decoder_config(tmp_path / "run", "eval.metrics=[psnrr]"))
    with pytest.raises(UserError, match="no latent store"):
        train_decoder(decoder_config(tmp_path / "run", f"cache.path={tmp_path / 'nothing'}"))


def test_a_folder_of_another_run_is_refused(trained: tuple[Path, dict], decoder_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="seed"):
        train_decoder(decoder_config(trained[0], "training.global_seed=5"))


def test_discriminator_s_schedule_ends_when_the_config_says() -> None:
    asked = Scheduler(type="cosine", warmup_epochs=1, decay_end_epoch=16, final_lr=2e-5)
    moved = disc_scheduler(asked, first=60, steps_per_epoch=10)
    assert (moved.warmup_steps, moved.decay_end_steps) == (10, 100)
    with pytest.raises(UserError, match="after its start"):
        disc_scheduler(asked, first=160, steps_per_epoch=10)
    assert disc_scheduler(Scheduler(), first=60, steps_per_epoch=10) == Scheduler()
    assert GanLoss().disc_upd_start is None
