import json

import pytest
from PIL import Image

from rae_fast.errors import UserError
from rae_fast.evaluation.run_report import write_run_report
from rae_fast.provenance import write_json


def _lines(path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_in_progress_becomes_a_page(tmp_path) -> None:
    write_json(tmp_path / "manifest.json", {"identity": {"encoder": "abc123"}, "ranks": 2, "device": "CPU"})
    _lines(
        tmp_path / "log.jsonl",
        [
            {"step": s, "images": 8 * s, "loss": 1 / s, "lr": 0.1, "grad_norm": 1.0, "loss_t0.00-0.25": 2.0}
            for s in (1, 2)
        ],
    )
    _lines(tmp_path / "speed.jsonl", [{"step": 2, "images_per_s": 51.25, "data_wait": 0.01, "memory_bytes": 2e9}])
    _lines(tmp_path / "eval.jsonl", [{"step": 2, "images": 16, "weights": "ema", "psnr_db": 23.4567}])
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples/step-0000002.png")
    text = write_run_report(tmp_path).read_text()
    for said in ("51.2", "abc123", "step-0000002", "23.46", "2.0 GB", "loss by timestep"):
        assert said in text


def test_a_run_without_a_log_line_yet_is_a_page_too(tmp_path) -> None:
    write_json(tmp_path / "manifest.json", {"identity": {}})
    assert "none yet" in write_run_report(tmp_path).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        write_run_report(tmp_path)
