"""Checkpoints: exact, atomic, checksummed, and independent of how many ranks or which ZeRO stage wrote them.

    checkpoints/step-0000100/
        manifest.json                       what it is; every other file with its size and SHA-256
        rank-00000-of-00002.safetensors     flat pieces of masters, Adam moments and EMA, one tensor for each kind
        rank-00000-of-00002.json            which elements of which parameter these pieces are
        fixed.safetensors                   buffers and frozen parameters
        state.json                          counters, position in the data, whatever the trainer adds
    checkpoints/latest                      name of the newest folder

Each rank writes its own pieces once, into a folder with a temporary name; rank 0 renames it when all are there. The
training loop waits only for the copy to host memory. A restart maps the pieces onto whatever layout it has.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from rae_fast.errors import UserError
from rae_fast.provenance import atomic_write, read_json, sha256_file, versions, write_json
from rae_fast.runtime import Ranks
from rae_fast.training.engine import Engine
from rae_fast.training.restore import (
    FORMAT,
    PREFIX,
    agree,
    check_same_shapes,
    find_damage,
    load_into,
    name_of,
    stem_of,
)
from rae_fast.training.shards import Segment

COMMIT_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint in host memory."""

    step: int
    tensors: dict[str, Tensor]  # "<engine>/<kind>" -> flat float32
    segments: dict[str, list[tuple[str, int, int]]]  # engine -> (name, start, length), in the order of the tensors
    fixed: dict[str, Tensor]
    state: dict[str, Any]
    about: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Args:
        folder: the run's `checkpoints` folder, on a file system that all ranks see.
        ranks: who takes part.
        keep: so many newest checkpoints stay.
        keep_every: checkpoints at multiples of this step stay for good.
        background: write in a thread; False: `save` returns when the checkpoint is complete.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, *, keep: int = 3, keep_every: int | None = None, background: bool = True
    ) -> None:
        self.folder, self.ranks, self.background = Path(folder), ranks, background
        self.keep, self.keep_every = max(keep, 1), keep_every
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        # Ranks must agree on the temporary name, and never meet files of an earlier run that was killed.
        self._run = agree(uuid4().hex[:12], ranks)
        if ranks.is_main:
            for stale in self.folder.glob(f".{PREFIX}*.part"):
                shutil.rmtree(stale, ignore_errors=True)

    # --- writing ----------------------------------------------------------------------------------------------------

    def save(self, step: int, engines: Mapping[str, Engine], state: Mapping[str, Any]) -> None:
        """Take the state of all engines at `step`; complete on disk after `wait`, or before the next `save` returns.

        Args:
            step: optimizer steps done.
            engines: by name; the names are part of the checkpoint.
            state: JSON content of the trainer's own, the same on all ranks.

        Raises:
            UserError: this or the previous checkpoint could not be written.
        """
        self.wait()
        snapshot = take_snapshot(step, engines, state, self.ranks)
        if not self.background:
            self._write(snapshot)
            if self.ranks.world > 1:
                dist.barrier()
            return
        self._thread = threading.Thread(target=self._write_guarded, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint in progress is complete, on this rank.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write_guarded(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except (OSError, UserError) as error:
            self._failure = error

    def _write(self, snapshot: Snapshot) -> None:
        part = self.folder / f".{PREFIX}{snapshot.step:07d}.{self._run}.part"
        try:
            part.mkdir(parents=True, exist_ok=True)
            write_part(part, snapshot, self.ranks)
            if self.ranks.is_main:
                self._commit(part, snapshot)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoint {self.folder / name_of(snapshot.step)}: {error.strerror or error}",
                "a writable folder with room for it",
                "make room; the same command goes on from the last complete checkpoint",
            ) from error

    def _commit(self, part: Path, snapshot: Snapshot) -> None:
        """Wait for all ranks' pieces, then make the folder appear under its name, whole."""
        expected = [f"{stem_of(rank, self.ranks.world)}.json" for rank in range(self.ranks.world)]
        deadline_s = time.monotonic() + COMMIT_TIMEOUT_S
        while not all((part / name).exists() for name in expected):
            if time.monotonic() > deadline_s:
                missing = [name for name in expected if not (part / name).exists()]
                raise UserError(f"checkpoint {part}: no {', '.join(missing)} after {COMMIT_TIMEOUT_S:.0f} s")
            time.sleep(0.01)
        files = {}
        for path in sorted(part.iterdir()):
            known = json.loads(path.read_text())["file"] if path.name in expected else {}
            for name, facts in known.items():
                files[name] = facts
            if path.suffix == ".json" or path.name == "fixed.safetensors":
                files[path.name] = facts_of(path)
        content = {"format": FORMAT, "step": snapshot.step, "world": self.ranks.world, **snapshot.about}
        write_json(part / "manifest.json", {**content, "versions": versions(), "files": files})
        sync_folder(part)
        target = self.folder / name_of(snapshot.step)
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
        with atomic_write(self.folder / "latest", "w") as file:
            file.write(target.name + "\n")
        sync_folder(self.folder)
        self._prune()

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(self.folder / name_of(step), ignore_errors=True)

    # --- reading ----------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending, whether whole or not."""
        names = [path.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())

    def check_model(self, name: str, module: nn.Module) -> None:
        """Refuse a module that the newest checkpoint does not fit, before an engine takes memory for it.

        What cannot be read is left to `restore`, which falls back.

        Raises:
            UserError: trained parameters have other names or shapes.
        """
        steps = self.steps()
        if not steps:
            return
        path = self.folder / name_of(steps[-1])
        try:
            saved = read_json(path / "manifest.json")["engines"][name]["shapes"]
        except (UserError, KeyError, TypeError):
            return
        check_same_shapes(path, saved, {n: p.shape for n, p in module.named_parameters() if p.requires_grad})

    def restore(self, engines: Mapping[str, Engine]) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into the engines; a damaged one is named and passed over. Collective.

        Returns:
            The trainer's state, with `step`; None if there is no checkpoint.

        Raises:
            UserError: all checkpoints are damaged, or the newest whole one is of another model or EMA.
        """
        steps = agree(self.steps(), self.ranks)
        for step in reversed(steps):
            path = self.folder / name_of(step)
            damage = find_damage(path, self.ranks)
            if damage is None:
                return load_into(path, engines)
            if self.ranks.is_main:
                print(f"checkpoint {path} is damaged ({damage}); trying the one before", flush=True)
        if steps:
            raise UserError(
                f"{self.folder}: all {len(steps)} checkpoints are damaged",
                "at least one whole checkpoint",
                "restore a copy, or move the folder away to start anew",
            )
        return None


def take_snapshot(step: int, engines: Mapping[str, Engine], state: Mapping[str, Any], ranks: Ranks) -> Snapshot:
    """Copy this rank's part to host memory."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[str, int, int]]] = {}
    fixed: dict[str, Tensor] = {}
    about: dict[str, Any] = {"engines": {}}
    counters = {}
    for name, engine in engines.items():
        segments = own_segments(engine, ranks)
        pieces[name] = [(s.name, s.start, s.length) for s in segments]
        for kind, flats in engine.flat_state().items():
            tensors[f"{name}/{kind}"] = copy_to_host(flats, segments)
        if ranks.is_main:
            fixed.update({f"{name}/{key}": value for key, value in engine.fixed_tensors().items()})
        counters[name] = engine.scalar_state()
        about["engines"][name] = {
            "zero_stage": engine.zero_stage,
            "optimizer": engine.optimizer_type,
            "kinds": list(engine.flat_state()),
            "shapes": {key: list(shape) for key, shape in engine.shards.shapes.items()},
        }
    if any(engine.device.type == "cuda" for engine in engines.values()):
        torch.cuda.synchronize()
    return Snapshot(step, tensors, pieces, fixed, {"step": step, "engines": counters, "trainer": dict(state)}, about)


def own_segments(engine: Engine, ranks: Ranks) -> list[Segment]:
    """What this rank writes: its shard, or an equal share of what all ranks hold."""
    segments = engine.shards.segments
    if not engine.shards.replicated or ranks.world == 1:
        return segments
    total = sum(s.length for s in segments)
    low, high = (total * r // ranks.world for r in (ranks.rank, ranks.rank + 1))
    own, position = [], 0
    for s in segments:
        start, end = max(low - position, 0), min(high - position, s.length)
        if start < end:
            own.append(Segment(s.name, s.start + start, end - start, s.shard, s.offset + start))
        position += s.length
    return own


def copy_to_host(flats: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """The segments' elements, one after the other, in host memory; the caller synchronizes the device."""
    on_gpu = flats[0].device.type == "cuda"
    host = torch.empty(sum(s.length for s in segments), dtype=torch.float32, pin_memory=on_gpu)
    position = 0
    for s in segments:
        if flats[s.shard].numel():
            source = flats[s.shard][s.offset : s.offset + s.length]
            host[position : position + s.length].copy_(source, non_blocking=on_gpu)
        else:
            host[position : position + s.length].zero_()
        position += s.length
    return host


def write_part(part: Path, snapshot: Snapshot, ranks: Ranks) -> None:
    """Write one rank's files; its JSON comes last and says that the others are complete."""
    stem = stem_of(ranks.rank, ranks.world)
    if ranks.is_main:
        save_file(snapshot.fixed, part / "fixed.safetensors")
        sync_file(part / "fixed.safetensors")
        write_json(part / "state.json", snapshot.state)
    data = part / f"{stem}.safetensors"
    save_file(snapshot.tensors, data)
    sync_file(data)
    write_json(part / f"{stem}.json", {"file": {data.name: facts_of(data)}, "segments": snapshot.segments})


def facts_of(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
