"""The planner: figures that follow from one another, this machine measured, one sentence at the end."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.planner.machine import StepTime, measure_disk, measure_step
from rae_fast.planner.page import plan_page
from rae_fast.planner.plan import make_plan
from rae_fast.training.memory import advise, plan_memory

ROOT = Path(__file__).parents[2]
XL = ROOT / "configs/stage2/training/DiTDH-XL_DINOv2-B_256.yaml"
TINY_MODEL = (
    "stage_2.target=DiTDH",
    "stage_2.params.hidden_size=[32,64]",
    "stage_2.params.depth=[3,2]",
    "stage_2.params.num_heads=[2,2]",
    "runtime.precision=fp32",
    "training.global_batch_size=8",
    "training.epochs=3",
)


@pytest.fixture(scope="module")
def eight_h200() -> dict:
    return make_plan(load_config(XL), gpu="h200", count=8)


def test_a_node_of_the_table_has_the_figures_worked_out_by_hand(eight_h200: dict) -> None:
    memory, speed, store = eight_h200["memory"], eight_h200["speed"], eight_h200["store"]
    assert memory["parameters"] == 838_380_628
    states = {stage: part["fixed_bytes"] for stage, part in memory["stages"].items()}
    assert states["0"] > states["1"] > states["2"] > states["3"]
    # A global batch of 1024 gives each GPU 128; the floor at 256 is 625 images/s.
    assert speed["bound_images_s"] / 8 == pytest.approx(614, rel=0.01)
    assert speed["epochs"] == pytest.approx(1400, rel=1e-3)
    assert speed["hours_to_end"] == pytest.approx(speed["hours_per_epoch"] * speed["epochs"])
    assert speed["needed_bytes_s"] == pytest.approx(
        speed["expected_images_s"] * store["row_bytes"]["lossless"], rel=0.05
    )
    assert store["build_hours"] == max(store[f"{stage}_hours"] for stage in ("decode", "encode", "write"))


def test_break_even_is_where_the_two_ways_have_taken_equal_time(eight_h200: dict) -> None:
    speed, store = eight_h200["speed"], eight_h200["store"]
    epochs = speed["break_even_epoch"]
    cached = store["build_hours"] + epochs * speed["hours_per_epoch"]
    assert cached == pytest.approx(epochs * speed["online_hours_per_epoch"])


def test_largest_batch_is_what_the_out_of_memory_message_allows(eight_h200: dict) -> None:
    from rae_fast.training.dit_setup import build_model

    config = load_config(XL)
    with torch.device("meta"):
        model = build_model(config, resolve_geometry(config))
    stage = eight_h200["memory"]["stages"]["1"]
    plan = plan_memory(model, micro_batch=stage["largest_micro_batch"], world=8, zero_stage=1)
    assert plan.total_bytes == pytest.approx(0.92 * 141e9, rel=0.01)
    assert plan.total_bytes <= 0.92 * 141e9
    assert "runtime.activation_checkpointing=true" in advise(plan_memory(model, micro_batch=256), int(141e9))


def test_slow_disks_and_given_rates_bound_what_is_expected() -> None:
    config = load_config(XL)
    slow = make_plan(config, gpu="h200", count=8, disk_gbs=0.5, images_s=600.0)["speed"]
    assert slow["expected_images_s"] == pytest.approx(0.5e9 / 393_216)
    fast = make_plan(config, gpu="h200", images_s=600.0)["speed"]
    assert fast["expected_images_s"] == 600


def test_few_epochs_are_told_to_stay_online(eight_h200: dict) -> None:
    assert eight_h200["recommendation"].startswith("Cache (lossless, both views")
    short = make_plan(load_config(XL, ["training.epochs=2"]), gpu="h200", count=8)
    assert short["recommendation"].startswith("Stay online")


def test_what_does_not_fit_is_marked() -> None:
    plan = make_plan(load_config(XL), gpu="rtx4090", count=8)
    assert not plan["memory"]["stages"]["1"]["fits"]
    assert "does not fit by our estimate" in plan["recommendation"]
    assert "!" in plan_page(plan)


@pytest.mark.parametrize(("options", "message"), [({"gpu": "h20"}, "did you mean"), ({"count": 0}, "at least 1")])
def test_bad_input_is_one_line(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(load_config(XL), **options)


def test_this_machine_is_measured(cache_config: Callable[..., Config], tmp_path: Path, monkeypatch) -> None:
    import rae_fast.planner.machine as machine

    monkeypatch.setattr(machine, "DISK_BYTES", 1 << 20)
    monkeypatch.setattr(machine.measure_disk, "__defaults__", (0.1,))
    plan = make_plan(cache_config(tmp_path / "not" / "yet" / "store", *TINY_MODEL))
    assert plan["data"]["images"] == 41
    origins = plan["machine"]["origins"]
    assert [origins[key] for key in ("decode", "encode", "disk")] == ["measured here"] * 3
    assert plan["machine"]["disk_bytes_s"] > 0
    assert plan["speed"]["online_images_s"] < plan["speed"]["expected_images_s"]
    assert list(tmp_path.iterdir()) == []
    json.dumps(plan)


def test_a_step_grows_by_the_block(cache_config: Callable[..., Config], tmp_path: Path, monkeypatch) -> None:
    """Depths enter by the difference of models that differ in the blocks of one kind."""
    import rae_fast.planner.machine as machine

    def timed(config, geometry, device, models, batch) -> list[StepTime]:
        assert [model["depth"] for model in models] == [[1, 1], [3, 1], [1, 2]]
        return [StepTime(0.5 + 0.1 * t + 0.3 * h, 1.0 * t + 2.0 * h) for t, h in (m["depth"] for m in models)]

    monkeypatch.setattr(machine, "time_models", timed)
    config = cache_config(tmp_path / "store", *TINY_MODEL)
    step = measure_step(config, resolve_geometry(config), torch.device("cpu"), 1e11)
    assert step.image_s == pytest.approx(0.5 + 0.1 * 3 + 0.3 * 2)
    assert step.update_s == pytest.approx(3 + 4)
    assert step.images_s(8) == pytest.approx(8 / (8 * step.image_s + 7))


def test_disk_trial_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("rae_fast.planner.machine.DISK_BYTES", 1 << 20)
    assert measure_disk(tmp_path / "a" / "b", 6000, 0.05) > 0
    assert list(tmp_path.iterdir()) == []


def test_tool_prints_a_page_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tool = runpy.run_path(str(ROOT / "tools/plan.py"))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", "--config", str(XL), *arguments])
        assert tool["main"]() == 0
        return capsys.readouterr().out

    page = run("--gpu", "h200", "--count", "8")
    assert page.splitlines()[-1].startswith("Cache (")
    assert max(map(len, page.splitlines()[:-1])) <= 120
    assert json.loads(run("--gpu", "h200", "--count", "8", "--json"))["recommendation"] in page
