from __future__ import annotations

import json

import pytest
import torch

from rae_fast.errors import UserError
from rae_fast.runtime import Ranks
from rae_fast.training.engine import RECORD
from rae_fast.training.monitor import LAG, Monitor, append_line, read_log, truncate_log

NAMES = (*RECORD, "early", "early/count")


def monitor(folder, **options) -> Monitor:
    defaults = {"images_per_step": 4, "total_steps": 100, "log_interval": 5}
    return Monitor(folder, Ranks(), NAMES, **{**defaults, **options})


def figures(step: int, skipped: float = 0.0, stop: float = 0.0) -> torch.Tensor:
    loss = float("nan") if skipped else 1 + 1 / (step * 7)
    return torch.tensor([loss, 0.3 * step, skipped, stop, 0.1 * step, step % 2], dtype=torch.float64)


def run(watch: Monitor, first: int, last: int, **options: float) -> None:
    for step in range(first, last):
        watch.record(step, figures(step, **options), epoch=step / 10, lr=1e-3, samples=torch.tensor([step, step + 1]))


def test_log_holds_means_over_the_interval(tmp_path):
    watch = monitor(tmp_path)
    run(watch, 1, 11)
    watch.close()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[0]["images"] == 20
    assert lines[0]["loss"] == pytest.approx(sum(1 + 1 / (s * 7) for s in range(1, 6)) / 5)
    assert lines[0]["grad_norm"] == pytest.approx(0.3 * 3)
    assert lines[0]["early"] == pytest.approx(0.1 * (1 + 2 + 3 + 4 + 5) / 3), "a sum is divided by its own count"
    speed = read_log(tmp_path / "speed.jsonl")
    assert [line["step"] for line in speed] == [5, 10]
    assert all(line["images_per_s"] > 0 and line["memory_bytes"] > 0 for line in speed)


@pytest.mark.parametrize("cut", [3, 5, 7, 10, 11])
def test_interrupted_run_leaves_the_bytes_of_the_undisturbed_one(cut, tmp_path):
    undisturbed = monitor(tmp_path / "a")
    run(undisturbed, 1, 16)
    undisturbed.close()
    first = monitor(tmp_path / "b")
    run(first, 1, cut + 1)
    first.flush()
    state = json.loads(json.dumps(first.state()))
    run(first, cut + 1, 13)  # what was logged after the checkpoint, before the kill
    second = monitor(tmp_path / "b", start_step=cut)
    second.load_state(state)
    run(second, cut + 1, 16)
    second.close()
    assert (tmp_path / "b/log.jsonl").read_bytes() == (tmp_path / "a/log.jsonl").read_bytes()


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    truncate_log(path, 2)
    assert read_log(path) == [{"step": 1}, {"step": 2}]


def test_figures_are_read_some_steps_later_and_at_the_same_step_everywhere(tmp_path):
    watch = monitor(tmp_path)
    for step in range(1, 8):
        watch.record(step, figures(step, stop=float(step == 3)), epoch=0, lr=0)
        assert watch.stop == (step >= 3 + LAG)


def test_skipped_steps_are_recorded_with_their_samples_and_left_out_of_the_mean(tmp_path):
    watch = monitor(tmp_path)
    run(watch, 1, 3)
    run(watch, 3, 5, skipped=1.0)
    run(watch, 5, 6)
    watch.close()
    line = read_log(tmp_path / "log.jsonl")[0]
    assert line["skipped"] == 2
    assert line["loss"] == pytest.approx((1 + 1 / 7 + 1 + 1 / 14 + 1 + 1 / 35) / 3)
    events = read_log(tmp_path / "events.jsonl")
    assert [(e["step"], e["event"], e["samples"]) for e in events] == [(3, "skipped", [3, 4]), (4, "skipped", [4, 5])]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    watch = monitor(tmp_path, max_nonfinite=3)
    run(watch, 1, 3, skipped=1.0)
    run(watch, 3, 4)  # a good step ends the row
    with pytest.raises(UserError, match="not finite for 3 steps in a row"):
        run(watch, 4, 20, skipped=1.0)


def test_loss_spike_is_recorded(tmp_path):
    watch = monitor(tmp_path)
    noise = torch.Generator().manual_seed(0)
    for step in range(1, 121):
        values = figures(step)
        values[0] = 1 + 0.01 * torch.randn((), generator=noise) + (5.0 if step == 100 else 0.0)
        watch.record(step, values, epoch=0, lr=0, samples=torch.tensor([step]))
    watch.close()
    events = read_log(tmp_path / "events.jsonl")
    assert [(e["event"], e["samples"]) for e in events] == [("loss_spike", [100])]


def test_names_and_figures_must_match(tmp_path):
    watch = monitor(tmp_path)
    watch.record(1, torch.zeros(3), epoch=0, lr=0)
    with pytest.raises(ValueError, match="shorter"):
        watch.flush()
