"""A plan as a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rae_fast.config import Config
from rae_fast.planner.plan import make_plan
from rae_fast.training.memory import gib


def planned(config: Config) -> str:
    """The page of a config on this machine, for the `--dry-run` of tools."""
    return plan_page(make_plan(config))


def plan_page(plan: Mapping[str, Any]) -> str:
    """The plan in lines of at most 120 characters."""
    parts = [_head(plan), _store(plan["store"]), _memory(plan["memory"]), _speed(plan), _origins(plan["machine"])]
    return "\n\n".join([*("\n".join(part) for part in parts), plan["recommendation"]])


def _head(plan: Mapping[str, Any]) -> list[str]:
    machine, data, model = plan["machine"], plan["data"], plan["model"]
    return [
        f"{machine['count']} x {machine['name']}, {gib(machine['memory_bytes'])} each, {machine['cores']} cores a node",
        f"{model['target']}: {model['parameters']:,} parameters; "
        f"{plan['speed']['flops_per_image'] / 1e9:,.1f} GFLOP an image in training",
        f"{data['images']:,} images ({data['origin']})",
    ]


def _store(store: Mapping[str, Any]) -> list[str]:
    free = "" if store["free_bytes"] is None else f"; {gib(store['free_bytes'])} free"
    lines = [f"latent store{free}", f"  {'codec':10} {'one view':>14} {'both views':>14}"]
    for codec, by_views in store["bytes"].items():
        lines.append(f"  {codec:10} {gib(by_views['one view']):>14} {gib(by_views['both views']):>14}")
    rates = ", ".join(f"{stage} {_hours(store[f'{stage}_hours'])}" for stage in ("decode", "encode", "write"))
    return [*lines, f"  build of {'+'.join(store['configured']['views'])}: {_hours(store['build_hours'])} ({rates})"]


def _memory(memory: Mapping[str, Any]) -> list[str]:
    title = f"memory of one device at micro-batch {memory['micro_batch']}, eager blocks (compiled ones keep about half)"
    lines = [title, f"  {'':8} {'fixed':>10} {'activations':>12} {'together':>10}   largest batch   with recomputation"]
    for stage, part in memory["stages"].items():
        mark = "*" if int(stage) == memory["configured_stage"] else " "
        together = gib(part["total_bytes"]) + ("" if part["fits"] else " !")
        sizes = f"{gib(part['fixed_bytes']):>10} {gib(part['activation_bytes']):>12} {together:>10}"
        batches = f"{part['largest_micro_batch']:>15} {part['largest_recomputed']:>20}"
        lines.append(f" {mark}ZeRO {stage}  {sizes} {batches}")
    return [*lines, "  * as configured; ! more than the device holds"]


def _speed(plan: Mapping[str, Any]) -> list[str]:
    speed = plan["speed"]
    needed, had = speed["needed_bytes_s"], speed["had_bytes_s"]
    disk = "unknown" if had is None else f"{had / 1e9:.2f} GB/s"
    end = f"{speed['epochs']:,.1f} epochs"
    rates = [f"{speed[key]:,.1f}" for key in ("bound_images_s", "expected_images_s", "online_images_s")]
    epoch = [_hours(speed[key]) for key in ("hours_per_epoch", "online_hours_per_epoch")]
    lines = [
        "training",
        f"  images/s: at most {rates[0]}, expected {rates[1]} from the store, {rates[2]} online "
        f"(limited by {speed['online_limited_by']})",
        f"  reading: a node needs {needed / 1e9:.3f} GB/s and has {disk}; "
        f"exchange between devices takes {speed['exchange_share']:.1%} of a step",
        f"  an epoch: {epoch[0]} from the store, {epoch[1]} online",
        f"  to the end ({end}): {_hours(speed['hours_to_end'])} from the store, "
        f"{_hours(speed['online_hours_to_end'])} online",
    ]
    break_even = speed["break_even_epoch"]
    return [*lines, f"  a cache pays for itself after {'-' if break_even is None else f'{break_even:.2f}'} epochs"]


def _origins(machine: Mapping[str, Any]) -> list[str]:
    return ["where the figures come from", *(f"  {what}: {origin}" for what, origin in machine["origins"].items())]


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:,.1f} h"
