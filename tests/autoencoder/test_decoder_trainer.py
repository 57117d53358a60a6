"""Decoder training as a whole: it learns, it resumes to the same bytes, ranks do not matter, bad input is refused."""

from __future__ import annotations

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
from rae_fast.autoencoder.trainer import DecoderRun, train_decoder
from rae_fast.config import Config, GanLoss, Scheduler
from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.training.monitor import read_log

CPU = torch.device("cpu")
TOOL = Path(rae_fast.__file__).parents[1] / "tools" / "train_decoder.py"
LOGS = ("log.jsonl", "eval.jsonl")
EXPORTS = ("export/model.safetensors",)
# Once the game is on, hinges and the 8-bit grid turn rounding into steps of this size; a rank that saw only its own
# gradients would be off by a third.
GAME = 3e-2
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


def launch(config_file: Path, ranks: int, *overrides: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(TOOL), "--config", str(config_file), *overrides]
    return [
        subprocess.Popen(
            command,
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


@pytest.mark.timeout(900)
def test_two_deepspeed_ranks_see_the_losses_of_one(
    decoder_config: MakeConfig, decoder_overrides: list[str], empty_yaml: Path, tmp_path: Path
) -> None:
    settings = ["training.max_steps=8", "training.log_interval=1", "eval.eval_interval=8"]
    train_decoder(decoder_config(tmp_path / "one", *settings))
    pair = [*decoder_overrides, *settings, "runtime.engine=deepspeed", f"logging.run_folder={tmp_path / 'two'}"]
    finish(launch(empty_yaml, 2, *pair))
    for name in LOGS:
        one, two = read_log(tmp_path / "one" / name), read_log(tmp_path / "two" / name)
        assert len(one) == len(two) > 0
        for ours, theirs in zip(one, two, strict=True):
            gate = GAME if name != "log.jsonl" or ours["disc_loss"] is not None else 1e-5
            for key, value in ours.items():
                expected = pytest.approx(value, rel=gate, abs=1e-5) if isinstance(value, float) else value
                assert theirs[key] == expected, (name, ours["step"], key)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(
    decoder_config: MakeConfig, decoder_overrides: list[str], empty_yaml: Path, tmp_path: Path
) -> None:
    settings = ["training.max_steps=60", "eval.eval_interval=20", "training.checkpoint_every=5"]
    train_decoder(decoder_config(tmp_path / "whole", *settings))
    folder = tmp_path / "killed"
    arguments = [*decoder_overrides, *settings, f"logging.run_folder={folder}"]
    for wanted in (10, 35):
        (process,) = launch(empty_yaml, 1, *arguments)
        while process.poll() is None and not any(
            int(path.name[5:]) >= wanted for path in (folder / "checkpoints").glob("step-*")
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(launch(empty_yaml, 1, *arguments))
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
