"""The report: targets beside what was measured, nothing claimed that no result holds, README and results agree."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("report")


def made(benchmark: str, rows: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "question": "How fast?",
        "device": "CPU",
        "cpu": "a processor, 2 torch threads",
        "versions": {"torch": "2.14"},
        "date": "2026-01-02",
        "commit": "abc",
        "baseline": rows[0]["name"],
        "rows": rows,
        **facts,
    }


def entry(name: str, median: float, unit: str = "images/s", **facts: float) -> dict[str, Any]:
    return {"name": name, "median": median, "p10": median * 0.9, "p90": median * 1.1, "unit": unit, "n": 3, **facts}


@pytest.fixture
def results() -> dict[str, dict[str, Any]]:
    summary = {"S-like": {"cached_over_reference": 6.5, "break_even_epoch": 2.5}}
    summary["XL-like"] = {"cached_over_reference": 1.8}
    ends = made("end_to_end", [entry("S-like, reference", 10), entry("S-like, cached", 65)], summary=summary)
    warm = [
        entry("numpy", 9),
        entry("native buffered, verified", 8, ratio=0.9),
        entry("native mapped, verified", 9, ratio=1.2),
    ]
    decode = [entry("PIL + DataLoader", 10), entry("exact, cropped by PIL", 9), entry("exact", 22)]
    for one, ratio in zip(decode, (1.0, 0.9, 2.2), strict=True):
        one["ratio_to_baseline"] = ratio
    return {"end_to_end-cpu": ends, "store-warm": made("store-warm", warm), "decode": made("decode", decode)}


def test_targets_are_judged_by_the_results(report: ModuleType, results: dict) -> None:
    states = {target.what: target.state(results) for target in report.TARGETS}
    assert states["cached over the reference's way, steady images/s, S-like width, CPU"] == ("6.5 x", "reached")
    assert states["the cache has paid for itself, S-like width, CPU"] == ("2.5 epochs", "not reached")
    assert states["loader warm, one core, buffered, over numpy memmap"] == ("0.9 x", "reached")
    assert states["cached over the reference's way, XL-like width, CPU"] == ("1.8 x", "-")
    assert states["loader warm, one core, mapped, over numpy memmap"] == ("1.2 x", "not reached")
    assert states["decode and crop over PIL + DataLoader, CPU"] == ("2.2 x", "reached")
    assert states["DiTDH-XL, 256 tokens, one H200, bf16 step"] == ("unmeasured", "-")


def test_steps_on_another_device_are_no_measurement_of_the_targets(report: ModuleType) -> None:
    rows = [entry("reference's way, TF32", 200), entry("triton, compiled", 600)]
    step = made("train_step", rows, model="DiTDH-XL", tokens=256)
    assert report.best_rate("DiTDH-XL", 256)({"train_step": step}) is None
    step["device"] = "NVIDIA H200"
    assert report.best_rate("DiTDH-XL", 256)({"train_step": step}) == 600
    assert report.over_reference("TF32")({"train_step": step}) == 3
    assert report.best_rate("DiTDH-S", 256)({"train_step": step}) is None


def test_kernels_are_judged_by_the_rows_that_kernels_py_writes(report: ModuleType, script: Callable) -> None:
    timing = script("gpu_timing")
    attention = timing.rows_of(
        "attention trunk-XL N=256 D=72 forward+backward", {"compiled, cudnn": [150.0], "kernel": [100.0]}, FLOP=1e9
    )
    norm = timing.rows_of("norm trunk-XL forward", {"compiled": [30.0], "kernel": [20.0]}, B=64e6)
    result = made("kernels", attention + norm, ceilings={"copy_tb_s": 4.0})
    assert report.attention_gain({"kernels": result}) == 1.5
    assert report.worst_kernel({"kernels": result}) == pytest.approx(3.2 / 4.0)


def test_data_wait_is_a_share_of_the_step(report: ModuleType) -> None:
    rows = [entry("triton, compiled", 500, batch=256), entry("triton, compiled: data wait", 4, "ms")]
    step = made("train_step", rows, model="DiTDH-XL", tokens=256) | {"device": "NVIDIA H200"}
    assert report.data_wait({"train_step": step}) == pytest.approx(100 * 4 / 512)


def test_page_names_machine_versions_medians_and_what_is_unmeasured(
    report: ModuleType, results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stem, result in results.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path)])
    assert report.main() == 0
    text = (tmp_path / "REPORT.md").read_text()
    assert "CPU; a processor, 2 torch threads; 2026-01-02, commit abc; torch 2.14." in text
    assert "| S-like, cached | 65 | 58.5 | 71.5 | images/s | 6.50x | 3 |" in text
    assert "Unmeasured: DiTDH-XL, 256 tokens, one H200, bf16 step;" in text
    assert (tmp_path / "store-warm-bars.png").stat().st_size > 1000


def test_readme_is_rewritten_and_checked(
    report: ModuleType, results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    (folder / "end_to_end-cpu.json").write_text(json.dumps(results["end_to_end-cpu"]))
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")

    def run(*flags: str) -> int:
        arguments = ["report.py", "--results", str(folder), "--readme-file", str(readme), *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        return report.main()

    assert run("--check") == 1
    assert run("--readme") == 0
    assert run("--check") == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "S-like width, CPU | 6.5 x | >= 5x |" in text
    readme.write_text(text.replace("6.5 x", "9.5 x"))
    assert run("--check") == 1


def test_readme_has_the_figures_of_the_committed_results(report: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    if report.BEGIN not in text:
        pytest.skip("README.md has no figures yet")
    assert report.with_block(text, report.readme_block(report.load_results(report.RESULTS))) == text


def test_a_result_out_of_form_is_refused_by_name(report: ModuleType, results: dict, tmp_path: Path) -> None:
    from rae_fast.errors import UserError

    del results["store-warm"]["cpu"]
    (tmp_path / "store-warm.json").write_text(json.dumps(results["store-warm"]))
    with pytest.raises(UserError, match=r"store-warm\.json: cpu is None"):
        report.load_results(tmp_path)


def test_planner_foresaw_the_measured_steps_within_15_percent(report: ModuleType) -> None:
    results = report.newest_first(report.load_results(report.RESULTS), "planner")
    if not results:
        pytest.skip("planner.py has not been run")
    for result in results:
        shares = {e["name"]: e["predicted_over_measured"] for e in result["rows"] if "predicted_over_measured" in e}
        assert shares == {name: pytest.approx(1, abs=0.15) for name in shares}
