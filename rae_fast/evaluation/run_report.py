"""One page about a training run, while it runs or after: curves, sample grids, speed, what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rae_fast.errors import UserError
from rae_fast.evaluation.report import Page, column, read_log, readable_bytes
from rae_fast.provenance import read_json

LATEST_GRIDS = 3
# Axis title -> columns of log.jsonl drawn together; columns that a run does not have are left out.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "l1", "perceptual")),
    ("adversarial loss", ("adversarial", "disc_loss")),
    ("adaptive weight", ("adaptive_weight",)),
    ("discriminator accuracy", ("disc_accuracy",)),
    ("gradient norm", ("grad_norm", "disc_grad_norm")),
    ("learning rate", ("lr",)),
)
# Columns that begin so are drawn together: prefix -> (axis title, what stands before the rest of the name).
FAMILIES = {"loss_t": ("loss by timestep", "t "), "ema_distance_": ("relative distance of the EMA", "decay ")}


def write_run_report(folder: Path) -> Path:
    """Write `folder`/report.html and return its path.

    Raises:
        UserError: `folder` is not a run folder.
    """
    manifest_file = folder / "manifest.json"
    if not manifest_file.exists():
        raise UserError(
            f"{folder} has no manifest.json", "the folder of a training run", "give the run's logging.run_folder"
        )
    manifest = read_json(manifest_file)
    records, speed = read_log(folder / "log.jsonl"), read_log(folder / "speed.jsonl")
    page = Page(f"Run {folder.name}", f"{manifest.get('ranks', 1)} ranks on {manifest.get('device', 'unknown device')}")
    page.tiles(_figures(records, speed))
    add_curves(page, records)
    _add_evaluations(page, read_log(folder / "eval.jsonl"))
    _add_grids(page, folder / "samples")
    page.heading("Throughput")
    page.curves({"images/s": column(speed, "step", "images_per_s")}, "optimizer step", "images/s")
    shares = {"data wait": column(speed, "step", "data_wait"), "MFU": column(speed, "step", "mfu")}
    page.curves(shares, "optimizer step", "share")
    memory_gb = {"peak memory of rank 0": column(speed, "step", "memory_bytes")}
    page.curves({n: (x, [y / 1e9 for y in ys]) for n, (x, ys) in memory_gb.items()}, "optimizer step", "GB")
    _add_events(page, folder)
    page.heading("Checkpoints")
    page.text(", ".join(sorted(path.name for path in (folder / "checkpoints").glob("step-*"))) or "none yet")
    page.heading("Made from")
    page.facts(dict(_flat(manifest)))
    page.save(folder / "report.html")
    return folder / "report.html"


def add_curves(page: Page, records: Sequence[Mapping[str, Any]]) -> None:
    """A plot for each panel and family that the records have columns for."""
    for title, names in PANELS:
        page.curves({name: column(records, "step", name) for name in names}, "optimizer step", title)
    for prefix, (title, before) in FAMILIES.items():
        names = sorted({name for record in records for name in record if name.startswith(prefix)})
        curves = {before + name.removeprefix(prefix): column(records, "step", name) for name in names}
        page.curves(curves, "optimizer step", title)


def _figures(records: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not records:
        return {"steps logged": "0"}
    last = records[-1]
    figures = {"optimizer steps": f"{last['step']:,}", "images": f"{last['images']:,}", "loss": f"{last['loss']:.4g}"}
    if speed:
        rates = sorted(record["images_per_s"] for record in speed)
        figures["images/s, median"] = f"{rates[len(rates) // 2]:,.1f}"
        figures["peak memory of rank 0"] = readable_bytes(max(record["memory_bytes"] for record in speed))
        if speed[-1].get("mfu") is not None:
            figures["model FLOPs utilization"] = f"{speed[-1]['mfu']:.1%}"
    return figures


def _add_evaluations(page: Page, evaluations: Sequence[Mapping[str, Any]]) -> None:
    if not evaluations:
        return
    page.heading("Evaluation")
    names = [name for name in evaluations[-1] if name not in ("step", "images", "weights")]
    page.table(
        ("step", "weights", *names),
        [(e["step"], e["weights"], *(e.get(name, "") for name in names)) for e in evaluations],
    )


def _add_grids(page: Page, folder: Path) -> None:
    grids = sorted(folder.glob("*.png"))[-LATEST_GRIDS:]
    if grids:
        page.heading("Samples")
    for grid in reversed(grids):
        page.image(grid, grid.stem, pixels=True)


def _add_events(page: Page, folder: Path) -> None:
    events = [event for path in sorted(folder.glob("events*.jsonl")) for event in read_log(path)]
    if events:
        page.heading("Skipped steps and loss spikes")
        page.table(("step", "what"), [(event.get("step", ""), event.get("event", event)) for event in events])


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in content.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
