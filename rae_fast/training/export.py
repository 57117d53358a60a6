"""Weights for others: the reference's `.pt` files and safetensors, from a live engine or from a checkpoint on disk."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.interop.official import save_content, save_safetensors, save_weights
from rae_fast.provenance import read_json
from rae_fast.training.ema import POWER, Profile, reconstruct
from rae_fast.training.engine import Engine
from rae_fast.training.restore import FORMAT, PREFIX, newest, read_fixed, read_whole


def export_weights(folder: Path, engine: Engine, *, step: int, epoch: int, released: str = "stage2_model.pt") -> None:
    """Write a run's weights; collective, rank 0 writes.

        <released>            the first EMA as a bare state dict, the reference's released form
        checkpoint.pt         {step, epoch, model, ema}, as the reference's training checkpoints without optimizer
        ema-<decay>.safetensors   each EMA

    Args:
        folder: the run's `export` folder.
        engine: whose weights.
        step: optimizer steps done.
        epoch: epochs done.
        released: file name of the bare state dict.
    """
    keep = engine.ranks.is_main
    model = engine.weights(keep=keep)
    averages = {label: engine.ema_weights(label, keep=keep) for label in engine.ema.labels}
    if not keep:
        return
    ema = next(iter(averages.values()), model)
    save_weights(folder / released, ema)
    save_content(folder / "checkpoint.pt", {"step": step, "epoch": epoch, "model": model, "ema": ema})
    for label, weights in averages.items():
        # One entry: safetensors writes several in an order of its own, and equal weights must make equal bytes.
        facts = json.dumps({"step": step, "epoch": epoch, "ema_decay": label})
        save_safetensors(folder / f"ema-{label}.safetensors", weights, {"rae_fast": facts})


def export_checkpoint(source: Path, target: Path, *, ema: str | None = None, dtype: str | None = None) -> int:
    """Write weights out of a run's checkpoint, while it runs or after; returns the number of tensors.

    Args:
        source: see `checkpoint_weights`.
        target: .pt, the reference's released form, or .safetensors.
        ema: see `checkpoint_weights`.
        dtype: fp32, bf16 or fp16; None: float32.

    Raises:
        UserError: see `checkpoint_weights`.
    """
    weights = checkpoint_weights(source, ema=ema)
    save_weights(target, weights, dtype)
    return len(weights)


def checkpoint_weights(path: str | Path, *, engine: str = "model", ema: str | None = None) -> dict[str, Tensor]:
    """A full float32 state dict from a checkpoint, without building a model; also while the run goes on.

    Args:
        path: a run folder, its `checkpoints` folder (the newest is taken), or a `step-...` folder in it.
        engine: which of the checkpoint's modules.
        ema: decay of the EMA wanted; None: the first one kept, or the online weights if there is none; "online"; or
            `power_<sigma_rel>` of a width that was not kept, made from the power averages of this checkpoint and the
            ones before it.

    Raises:
        UserError: no checkpoint there, or no such EMA in it, nor what it could be made from.
    """
    path = newest(Path(path))
    manifest = _manifest(path, engine)
    averages = _averages(manifest, engine)
    wanted = ema or next(iter(averages), "online")
    if wanted == "online" or wanted in averages:
        kind = "master" if wanted == "online" else f"ema/{wanted}"
        return {**read_whole(path, manifest, engine, kind), **read_fixed(path, engine)}
    if not wanted.startswith(POWER) or not any(label.startswith(POWER) for label in averages):
        raise UserError(f"{path} holds no EMA {wanted}", f"one of {', '.join(averages) or 'none'}, or online")
    return {**_reconstructed(path, engine, wanted, manifest["step"]), **read_fixed(path, engine)}


def _reconstructed(path: Path, engine: str, wanted: str, step: int) -> dict[str, Tensor]:
    """The power average `wanted` at `step`, from those in all checkpoints of the run up to it."""
    width = Profile.parse(wanted).sigma_rel
    stored = []
    for other in sorted(path.parent.glob(f"{PREFIX}*")):
        manifest = _manifest(other, engine)
        for label in _averages(manifest, engine):
            kept = Profile.parse(label).sigma_rel
            if kept is not None and manifest["step"] <= step:
                read = partial(read_whole, other, manifest, engine, f"ema/{label}")
                stored.append((kept, manifest["step"], read))
    assert width is not None
    return reconstruct(stored, width, step)


def _manifest(path: Path, engine: str) -> dict[str, Any]:
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT or engine not in manifest.get("engines", {}):
        raise UserError(f"{path} is not a checkpoint with {engine!r}", f"one of format {FORMAT}")
    return manifest


def _averages(manifest: dict[str, Any], engine: str) -> list[str]:
    """Labels of the EMAs that a checkpoint holds."""
    kinds = manifest["engines"][engine]["kinds"]
    return [kind.removeprefix("ema/") for kind in kinds if kind.startswith("ema/")]
