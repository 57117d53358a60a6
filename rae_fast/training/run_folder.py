"""The folder of one run: who works in it, what it was asked to do, what it was made from.

runs/<name>/{config.yaml, manifest.json, log.jsonl, speed.jsonl, events.jsonl, checkpoints/, samples/, export/}
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from rae_fast.config import Config
from rae_fast.config_file import to_yaml
from rae_fast.errors import UserError
from rae_fast.provenance import atomic_write, read_json, versions, write_json
from rae_fast.runtime import Ranks, device_name
from rae_fast.training.restore import agree

# Ranks of a killed run notice its death within seconds and let go of the folder.
LOCK_WAIT_S = 20.0


def run_folder(config: Config, default_name: str) -> Path:
    """`logging.run_folder`, or runs/<logging.name or default_name>."""
    if config.logging.run_folder:
        return Path(config.logging.run_folder)
    return Path("runs") / (config.logging.name or default_name)


@contextmanager
def sole_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder for this run; the lock falls with rank 0's process, however that ends.

    Raises:
        UserError: the folder cannot be written, or another run is at work in it.
    """
    lock, refusal = None, None
    if ranks.is_main:
        try:
            lock = take_lock(folder)
        except UserError as error:
            refusal = (error.found, error.expected, error.mend)
    refusal = agree(refusal, ranks)
    if refusal is not None:
        raise UserError(*refusal)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def take_lock(folder: Path) -> IO[str]:
    """The folder's lock file, locked until it is closed.

    Raises:
        UserError: see `sole_run`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot write run folder {folder}: {error.strerror}", "a writable folder", "choose another one"
        ) from error
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError as error:
            if time.monotonic() > deadline_s:
                lock.close()
                raise UserError(
                    f"another run is at work in {folder}", "one at a time", "wait for it, or choose another folder"
                ) from error
            time.sleep(0.2)


def describe_run(
    folder: Path, config: Config, ranks: Ranks, device: torch.device, identity: Mapping[str, Any], **facts: Any
) -> None:
    """Write config.yaml and manifest.json, and refuse a folder whose run was made from something else.

    Args:
        folder: the run folder.
        config: the whole configuration.
        ranks: rank 0 writes.
        device: where it runs.
        identity: what must not change between the calls that make one run (data, global batch, seed).
        facts: what else the manifest should say.

    Raises:
        UserError: the folder's run has another identity.
    """
    path = folder / "manifest.json"
    if path.exists():
        earlier = read_json(path).get("identity", {})
        for key in sorted(set(identity) | set(earlier)):
            if plain(identity.get(key)) != earlier.get(key):
                raise UserError(
                    f"{folder} was begun with {key} {earlier.get(key)}; now it is {plain(identity.get(key))}",
                    "the same, as samples and steps are counted by it",
                    "set it back, or start another run with logging.run_folder=<folder>",
                )
    if not ranks.is_main:
        return
    with atomic_write(folder / "config.yaml", "w") as file:
        file.write(to_yaml(config))
    content = {"identity": plain(identity), **facts, "ranks": ranks.world, "device": device_name(device)}
    write_json(path, {**content, "versions": versions()})


def plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


class StopSignals:
    """Notes SIGTERM and SIGUSR1, with which schedulers announce the end, instead of dying of them.

    Ranks agree on the step to stop at through `Engine.stop_requested` and `Monitor.stop`. A second SIGTERM kills.
    """

    NOTED = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self.NOTED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.requested = True


def share_threads(ranks: Ranks, device: torch.device) -> None:
    """Divide this machine's cores among its CPU ranks, unless OMP_NUM_THREADS says how many threads each gets."""
    local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or ranks.world)
    if device.type == "cpu" and local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
