"""Reads checkpoints: which one is whole, and its pieces into engines of any layout; `checkpoint.py` has the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.provenance import read_json, sha256_file
from rae_fast.runtime import Ranks
from rae_fast.training.engine import Engine
from rae_fast.training.shards import Segment

FORMAT = 1
PREFIX = "step-"


def find_damage(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, or None; ranks share the files among them and agree on the answer."""
    found = None
    try:
        manifest = read_json(path / "manifest.json")
        files = sorted(manifest["files"].items())
        for name, facts in files[ranks.rank :: ranks.world]:
            if not (path / name).exists():
                found = f"{name} is missing"
            elif (path / name).stat().st_size != facts["bytes"]:
                found = f"{name} has {(path / name).stat().st_size} bytes instead of {facts['bytes']}"
            elif sha256_file(path / name) != facts["sha256"]:
                found = f"{name}: checksum differs"
            if found:
                break
    except (UserError, KeyError, TypeError, AttributeError) as error:
        found = f"manifest.json: {error}"
    if ranks.world == 1:
        return found
    answers: list[str | None] = [None] * ranks.world
    dist.all_gather_object(answers, found)
    return next((answer for answer in answers if answer), None)


def load_into(path: Path, engines: Mapping[str, Engine]) -> dict[str, Any]:
    """Copy a whole checkpoint into engines of the same models; collective.

    Raises:
        UserError: engines, parameter names, shapes or EMA decays differ.
    """
    manifest, state = read_json(path / "manifest.json"), read_json(path / "state.json")
    if manifest["format"] != FORMAT:
        raise UserError(f"{path}: format {manifest['format']}", f"format {FORMAT}", "use the version that wrote it")
    for name, engine in engines.items():
        check_same_model(path, name, manifest["engines"].get(name), engine)
        pieces = read_pieces(path, manifest["world"], name)
        for kind, flats in engine.flat_state().items():
            read_kind(path, f"{name}/{kind}", pieces, engine.shards.segments, flats)
    for name, engine in engines.items():
        engine.restore(state["engines"][name], read_fixed(path, name))
    return {**state["trainer"], "step": manifest["step"]}


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a parameter lie in `file` from `offset` on."""

    start: int
    length: int
    file: str
    offset: int


def read_pieces(path: Path, world: int, engine: str) -> dict[str, list[Piece]]:
    """Where each parameter's elements lie, over all ranks' files."""
    pieces: dict[str, list[Piece]] = {}
    for rank in range(world):
        stem, offset = stem_of(rank, world), 0
        for name, start, length in read_json(path / f"{stem}.json")["segments"][engine]:
            pieces.setdefault(name, []).append(Piece(start, length, f"{stem}.safetensors", offset))
            offset += length
    return pieces


@torch.no_grad()
def read_kind(
    path: Path, key: str, pieces: Mapping[str, list[Piece]], segments: Sequence[Segment], flats: Sequence[Tensor]
) -> None:
    """Fill one kind of flat tensors (masters, moments, an EMA) from the files."""
    wanted: dict[str, list[tuple[Segment, Piece]]] = {}
    for segment in segments:
        for piece in pieces[segment.name] if flats[segment.shard].numel() else ():
            if piece.start < segment.start + segment.length and segment.start < piece.start + piece.length:
                wanted.setdefault(piece.file, []).append((segment, piece))
    for name, overlaps in wanted.items():
        with safe_open(path / name, "pt") as file:
            source = file.get_slice(key)
            for segment, piece in overlaps:
                start = max(segment.start, piece.start)
                length = min(segment.start + segment.length, piece.start + piece.length) - start
                begin, target = piece.offset + start - piece.start, segment.offset + start - segment.start
                flats[segment.shard][target : target + length].copy_(source[begin : begin + length])


def read_whole(path: Path, manifest: Mapping[str, Any], engine: str, kind: str) -> dict[str, Tensor]:
    """Whole float32 tensors of one kind (master, exp_avg, ema/<decay>, ...) by parameter name, in the module's order.

    Args:
        path: the checkpoint.
        manifest: its manifest.json.
        engine: which of its modules.
        kind: one of the manifest's `kinds`.
    """
    shapes = manifest["engines"][engine]["shapes"]
    found = {name: torch.empty(prod(shape)) for name, shape in shapes.items()}
    wholes = [Segment(name, 0, len(flat), i, 0) for i, (name, flat) in enumerate(found.items())]
    read_kind(path, f"{engine}/{kind}", read_pieces(path, manifest["world"], engine), wholes, list(found.values()))
    return {name: found[name].view(shape) for name, shape in shapes.items()}


def read_fixed(path: Path, engine: str) -> dict[str, Tensor]:
    """Persistent buffers and frozen parameters."""
    with safe_open(path / "fixed.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{engine}/")]  # noqa: SIM118 - not a mapping
        return {key.removeprefix(f"{engine}/"): file.get_tensor(key) for key in keys}


def newest(path: Path) -> Path:
    """The checkpoint that `path` stands for: itself, or the newest of a `checkpoints` or run folder.

    Raises:
        UserError: there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / "latest").is_file():
            return folder / (folder / "latest").read_text().strip()
    if not (path / "manifest.json").is_file() or not path.name.startswith(PREFIX):
        raise UserError(f"no checkpoint in {path}", "a run folder, its checkpoints folder, or a step-... in it")
    return path


def check_same_model(path: Path, name: str, saved: Mapping[str, Any] | None, engine: Engine) -> None:
    """Refuse a checkpoint of another model, of another optimizer or with other EMA decays."""
    if saved is None:
        raise UserError(f"checkpoint {path} holds no {name!r}", "a checkpoint of this kind of training")
    check_same_shapes(path, saved["shapes"], engine.shards.shapes)
    optimizer = saved.get("optimizer", "adamw")
    if optimizer != engine.optimizer_type:
        raise UserError(
            f"checkpoint {path} was made by optimizer.type {optimizer}",
            f"{engine.optimizer_type}, as in the config",
            "set optimizer.type as it was, or start anew from the exported weights with stage_2.ckpt",
        )
    kinds = list(engine.flat_state())
    if sorted(kinds) != sorted(saved["kinds"]):
        averages = [[k.removeprefix("ema/") for k in ks if k.startswith("ema/")] for ks in (saved["kinds"], kinds)]
        raise UserError(
            f"checkpoint {path} holds EMA {', '.join(averages[0]) or 'of no decay'}",
            f"{', '.join(averages[1]) or 'none'} as in training.ema_decay",
            "set training.ema_decay as it was, or use another run folder",
        )


def check_same_shapes(path: Path, saved: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a checkpoint whose trained parameters have other names or shapes.

    Args:
        path: of the checkpoint.
        saved: shapes by name, of its manifest.
        shapes: of the model at hand.
    """
    for key in sorted(set(shapes) | set(saved)):
        here, there = (list(given[key]) if key in given else None for given in (shapes, saved))
        if here != there:
            raise UserError(
                f"checkpoint {path}: {key} has shape {there or 'none: it is absent'}",
                f"{here or 'no such parameter'}, as the config's model has",
                "use the config that wrote it, or another run folder",
            )


def agree(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value, on all ranks."""
    if ranks.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def name_of(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"{PREFIX}{step:07d}"


def stem_of(rank: int, world: int) -> str:
    """File name, without its ending, of a rank's part."""
    return f"rank-{rank:05d}-of-{world:05d}"
