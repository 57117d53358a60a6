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
def test_offline_run_is_recorded_beside_the_jsonl(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_dit(tiny_config(tmp_path, "runtime.engine=ddp", "logging.wandb=offline", "training.max_steps=3"))
    recorded = list(Path(tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(recorded) == 1
    content = recorded[0].read_bytes()
    assert b"loss_t0.25-0.50" in content
    assert b"images_per_s" in content
    assert len(read_log(tmp_path / "run/log.jsonl")) == 3
