"""Weights for others: the reference's `.pt` files and safetensors, from a live engine or from a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.interop.official import save_content, save_safetensors, save_weights
from rae_fast.provenance import read_json
from rae_fast.training.engine import Engine
from rae_fast.training.restore import FORMAT, read_pieces


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


def checkpoint_weights(path: str | Path, *, engine: str = "model", ema: str | None = None) -> dict[str, Tensor]:
    """A full float32 state dict from a checkpoint folder, without building a model.

    Args:
        path: a `step-...` folder, or the `checkpoints` folder, whose `latest` is taken.
        engine: which of the checkpoint's modules.
        ema: decay of the EMA wanted; None: the first one kept, or the online weights if there is none; "online".

    Raises:
        UserError: no checkpoint there, or no such EMA in it.
    """
    path = Path(path)
    if (path / "latest").is_file():
        path = path / (path / "latest").read_text().strip()
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT or engine not in manifest.get("engines", {}):
        raise UserError(f"{path} is not a checkpoint with {engine!r}", f"one of format {FORMAT}")
    about = manifest["engines"][engine]
    averages = [kind.removeprefix("ema/") for kind in about["kinds"] if kind.startswith("ema/")]
    wanted = ema or next(iter(averages), "online")
    if wanted != "online" and wanted not in averages:
        raise UserError(f"{path} holds no EMA {wanted}", f"one of {', '.join(averages) or 'none'}, or online")
    kind = "master" if wanted == "online" else f"ema/{wanted}"
    found = {name: torch.empty(shape) for name, shape in about["shapes"].items()}
    by_file: dict[str, list[tuple[str, Any]]] = {}
    for name, pieces in read_pieces(path, manifest["world"], engine).items():
        for piece in pieces:
            by_file.setdefault(piece.file, []).append((name, piece))
    for file_name, entries in by_file.items():
        with safe_open(path / file_name, "pt") as file:
            source = file.get_slice(f"{engine}/{kind}")
            for name, piece in entries:
                flat = found[name].view(-1)[piece.start : piece.start + piece.length]
                flat.copy_(source[piece.offset : piece.offset + piece.length])
    with safe_open(path / "fixed.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{engine}/")]  # noqa: SIM118 - not a mapping
        found.update({key.removeprefix(f"{engine}/"): file.get_tensor(key) for key in keys})
    return found
