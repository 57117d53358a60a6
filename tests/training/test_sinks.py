from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from rae_fast.config import Logging
from rae_fast.runtime import Ranks
from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log
from rae_fast.training.sinks import open_sink


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


def test_event_files_hold_what_the_log_holds_and_restarts_purge(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    def events() -> list[Event]:
        found = []
        for path in sorted((tmp_path / "tensorboard").iterdir()):
            data = path.read_bytes()
            while data:
                length = int.from_bytes(data[:8], "little")
                assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
                found.append(Event.FromString(data[12 : 12 + length]))
                data = data[12 + length + 4 :]
        return found

    picture = tmp_path / "grid.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    for start in (0, 64):
        sink = open_sink(Logging(tensorboard=True), tmp_path, Ranks(), {}, start)
        sink.log({"step": 1, "images": start + 32, "loss": 0.5, "lr": None, "time": "now"})
        sink.image("samples", picture, start + 32)
        sink.close()
    scalars = {(e.step, v.tag): v.simple_value for e in events() for v in e.summary.value if v.tag != "samples"}
    assert scalars == {(32, "loss"): 0.5, (32, "step"): 1.0, (96, "loss"): 0.5, (96, "step"): 1.0}
    assert [e.step for e in events() for v in e.summary.value if v.tag == "samples"] == [32, 96]
    starts = [e.step for e in events() if e.session_log.status == e.session_log.START]
    assert starts == [64]
