"""Stages that are run once each and remembered: an interrupted run goes on from the last finished one."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from rae_fast.provenance import atomic_write, read_json, write_json

SAMPLE_INTERVAL_S = 0.25


class Stages:
    """Runs named steps in order; each one's result (a JSON-able dict) is kept in `folder`/stages/<name>.json.

    A step is skipped if its record is there and was made from the same inputs: its own, and those of every step
    before it. A step that was begun from the same inputs goes on from what it left; one that was begun from others
    starts from nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "stages"
        self.seconds: dict[str, float] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.peak_memory_bytes = 0
        self._digest = ""

    def run(
        self, name: str, title: str, inputs: Any, step: Callable[[], dict[str, Any]], outputs: Sequence[Path] = ()
    ) -> dict[str, Any]:
        """Run `step`, or take its result from an earlier run with the same `inputs` (any JSON-able value).

        Args:
            name: of the record.
            title: what the user reads.
            inputs: what the step depends on beside the steps before it.
            step: does the work, or goes on with it.
            outputs: folders and files that it makes, which are removed if they were made from other inputs.
        """
        text = json.dumps([self._digest, name, inputs], sort_keys=True, default=str)
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        path = self.folder / f"{name}.json"
        record = read_json(path) if path.exists() else None
        if record is None or record["inputs"] != self._digest:
            print(f"== {title}", file=sys.stderr, flush=True)
            self._begin(name, outputs)
            record = self._record(step)
            write_json(path, record)
            print(f"   {record['seconds']:.0f} s", file=sys.stderr, flush=True)
        else:
            print(f"== {title}: done before", file=sys.stderr, flush=True)
        self.seconds[name] = record["seconds"]
        self.results[name] = record["result"]
        self.peak_memory_bytes = max(self.peak_memory_bytes, record["peak_memory_bytes"])
        return record["result"]

    def _begin(self, name: str, outputs: Sequence[Path]) -> None:
        begun = self.folder / f"{name}.begun"
        if begun.exists() and begun.read_text() == self._digest:
            return
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        for output in outputs:
            if output.is_dir():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)
        with atomic_write(begun, "w") as file:
            file.write(self._digest)

    def _record(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        start_s = time.monotonic()
        with PeakMemory() as memory:
            result = step()
        seconds = round(time.monotonic() - start_s, 1)
        return {
            "inputs": self._digest,
            "seconds": seconds,
            "peak_memory_bytes": memory.peak_bytes,
            "result": result,
        }


class PeakMemory:
    """Largest sum of resident sizes of this process and all its descendants while the context is open, in bytes.

    Pages that processes share are counted once for each of them, so this is an upper bound.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        ended = False
        while not ended:
            ended = self._stop.wait(SAMPLE_INTERVAL_S)
            self.peak_bytes = max(self.peak_bytes, resident_bytes(process))


def resident_bytes(process: psutil.Process) -> int:
    """Resident size of a process and its descendants."""
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # it ended between the two calls
    return total
