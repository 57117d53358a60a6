"""Does the planner foresee what training then takes? Its predictions beside steps and bytes that were measured.

    python benchmarks/planner.py
    python benchmarks/planner.py --device cuda --models DiTDH-S --batch 64

The planner times models with one block of each kind and with several, and reckons up from there, in
rae_fast/planner/machine.py; here the whole models train too, in turn with the trials, by the same engine. On a GPU its
peak memory stands beside the memory plan's; on a CPU, whose allocator says nothing exact, tests count what autograd
saves instead.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from results_file import RESULTS, make_result, print_table, row, write_result

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.dit.registry import build_dit
from rae_fast.errors import exit_cleanly
from rae_fast.geometry import dit_params, resolve_geometry
from rae_fast.planner.machine import measure_products, measure_step, time_models
from rae_fast.runtime import pick_device
from rae_fast.training.batching import ema_decays
from rae_fast.training.memory import plan_memory

# Depths of the released models at widths that a CPU trains in seconds.
SCALED = {
    "S-like": {"hidden_size": [96, 512], "depth": [12, 2], "num_heads": [6, 16]},
    "XL-like": {"hidden_size": [144, 256], "depth": [28, 2], "num_heads": [12, 16]},
}
GRID, CHANNELS = 8, 96


def make_config(model: str, batch: int, device: torch.device) -> Config:
    """A configuration of which only model, optimizer and precision matter."""
    scaled = SCALED.get(model)
    side, channels = (GRID, CHANNELS) if scaled else (16, 768)
    values = {f"stage_2.params.{key}": value for key, value in (scaled or {}).items()}
    return load_config(
        None,
        [
            f"stage_2.target={'DiTDH' if scaled else model}",
            *(f"{key}={value}" for key, value in values.items()),
            f"misc.latent_size=[{channels},{side},{side}]",
            f"stage_1.params.encoder_input_size={14 * side}",
            "misc.num_classes=1000",
            f"training.batch_size={batch}",
            f"runtime.precision={'bf16' if device.type == 'cuda' else 'fp32'}",
            "runtime.engine=ddp",
        ],
    )


def measure(model: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Predicted and measured seconds of a step, round after round; on a GPU predicted and measured bytes too."""
    config = make_config(model, args.batch, device)
    geometry = resolve_geometry(config)
    params = dit_params(config, geometry)
    products = measure_products(device)
    predicted, measured, peaks = [], [], []
    for _ in range(args.rounds):
        step = measure_step(config, geometry, device, products)
        predicted.append(step.image_s * args.batch + step.update_s)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        (found,) = time_models(config, geometry, device, [params], args.batch)
        measured.append(found.image_s * args.batch + found.update_s)
        peaks.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
        gc.collect()
    ratio = statistics.median(a / b for a, b in zip(predicted, measured, strict=True))
    rows = [
        row(f"{model}, step measured", [1e3 * s for s in measured], "ms"),
        row(
            f"{model}, step planned",
            [1e3 * s for s in predicted],
            "ms",
            predicted_over_measured=round(ratio, 3),
        ),
    ]
    if device.type == "cuda":
        with torch.device("meta"):
            meta = build_dit(config.stage_2.target, params)
        averages = len(ema_decays(config.training))
        plan = plan_memory(meta, micro_batch=args.batch, zero_stage=0, averages=averages)
        peak = statistics.median(peaks)
        share = round(plan.total_bytes / peak, 3)
        rows.append(row(f"{model}, memory measured", [p / 2**30 for p in peaks], "GiB"))
        rows.append(row(f"{model}, memory planned", [plan.total_bytes / 2**30], "GiB", predicted_over_measured=share))
    return rows


def main() -> None:
    """Measure every model, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", help="S-like, XL-like, or released sizes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="result JSON")
    args = parser.parse_args()
    device = pick_device(args.device)
    models = args.models or (["DiTDH-S", "DiTDH-XL"] if device.type == "cuda" else list(SCALED))
    started_s = time.perf_counter()
    rows = [entry for model in models for entry in measure(model, args, device)]
    question = "Does the planner foresee what a training step takes?"
    facts = {"batch": args.batch, "seconds": round(time.perf_counter() - started_s, 1)}
    result = make_result("planner", question, rows[0]["name"], rows, device, **facts)
    print_table(result)
    for entry in rows:
        if "predicted_over_measured" in entry:
            print(f"{entry['name']}: {entry['predicted_over_measured']:.3f} of what was measured")
    write_result(args.out or RESULTS / f"planner-{device.type}.json", result)


if __name__ == "__main__":
    exit_cleanly(main)
