from __future__ import annotations

from pathlib import Path

import pytest

from rae_fast.config import Logging
from rae_fast.runtime import Ranks
from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log
from rae_fast.training.wandb_sink import open_sink


def test_off_and_other_ranks_have_no_sink(tmp_path):
    assert open_sink(Logging(wandb="off"), tmp_path, Ranks(), {}) is None
    assert open_sink(Logging(wandb="offline"), tmp_path, Ranks(1, 1, 2), {}) is None


@pytest.mark.slow
def test_offline_run_is_recorded_beside_the_jsonl(tiny_config, decoder, pristine_store, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    evaluate = ("eval.eval_interval=2", "eval.num_images=4", "sampler.params.num_steps=2")
    offline = ("runtime.engine=ddp", "logging.wandb=offline", "training.max_steps=3")
    train_dit(tiny_config(tmp_path, *offline, *evaluate, *decoder, "training.sample_every=2"))
    recorded = list(Path(tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(recorded) == 1
    content = recorded[0].read_bytes()
    panels = ("loss", "loss_t0.25-0.50", "grad_norm", "lr", "ema_distance_0.9", "images_per_s", "data_wait")
    for panel in (*panels, "memory_bytes", "skipped", "eval/ema/fd_latent"):
        assert panel.encode() in content, panel
    grids = list((tmp_path / "run/wandb").glob("offline-run-*/files/media/images/samples_*.png"))
    assert [grid.read_bytes() for grid in grids] == [(tmp_path / "run/samples/step-0000002.png").read_bytes()]
    # The config, and which store it was made from.
    assert b"time_dist_shift_base" in content
    assert str(pristine_store).encode() in content
    assert len(read_log(tmp_path / "run/log.jsonl")) == 3
