"""Figures of many images, computed once, block by block, by any number of processes that share a folder.

Each block of `BLOCK` images is one file. A process takes its own share of the blocks first, then whatever nobody else
is at work on; a block that another process has claimed is left to it until it is there or its process has died. So
ranks need no process group, none waits for another in a barrier, a killed job goes on where it stopped, and the same
blocks come out whatever the number of ranks.

Shapes: N images, n of a block, D values of a figure.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rae_fast.errors import UserError
from rae_fast.evaluation.frechet import StreamingMoments
from rae_fast.progress import Progress
from rae_fast.provenance import atomic_write, write_json
from rae_fast.runtime import Ranks

BLOCK = 256
CONTENT = "sha256"  # of the block's images; beside the figures in its file
POLL_S = 0.1


@dataclass(frozen=True)
class Figures:
    """What to compute.

    Attributes:
        key: everything that the figures depend on; JSON-able.
        count: N.
        compute: (start, stop) -> (SHA-256 of the images, 32 bytes; figure name -> float32 or float64 [n, D] or [n]).
        label: for the progress line.
    """

    key: Mapping[str, Any]
    count: int
    compute: Callable[[int, int], tuple[bytes, dict[str, np.ndarray]]]
    label: str

    @property
    def digest(self) -> str:
        """Name of the folder that the figures are kept in."""
        return hashlib.sha256(json.dumps([BLOCK, self.count, self.key], sort_keys=True).encode()).hexdigest()


class FigureSet:
    """The figures of all N images, on disk.

    Args:
        folder: where the blocks are.
        count: N.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    @property
    def names(self) -> list[str]:
        """Names of the figures."""
        with np.load(block_path(self.folder, 0)) as file:
            return [name for name in file.files if name != CONTENT]

    @property
    def content_sha256(self) -> str:
        """Hash of the images themselves, whatever files they came in."""
        digest = hashlib.sha256()
        for block in range(block_count(self.count)):
            with np.load(block_path(self.folder, block)) as file:
                digest.update(file[CONTENT].tobytes())
        return digest.hexdigest()

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """One figure, block by block."""
        for block in range(block_count(self.count)):
            with np.load(block_path(self.folder, block)) as file:
                yield file[name]

    def array(self, name: str, limit: int | None = None) -> np.ndarray:
        """One figure of all images, or of `limit` of them evenly spread."""
        rows = np.concatenate(list(self.blocks(name)))
        if limit is None or len(rows) <= limit:
            return rows
        return rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]

    def moments(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(mean [D], covariance [D, D]), float64; merged in the order of the blocks, and kept for the next time."""
        path = self.folder / f"moments-{name}.npz"
        if not path.exists():
            moments: StreamingMoments | None = None
            for rows in self.blocks(name):
                moments = moments or StreamingMoments(rows.shape[1])
                moments.update(rows)
            assert moments is not None
            mean, covariance = moments.finish()
            with atomic_write(path) as file:
                np.savez(file, mean=mean, covariance=covariance)
        with np.load(path) as file:
            return file["mean"], file["covariance"]


def collect(figures: Figures, cache: Path, ranks: Ranks) -> FigureSet | None:
    """Compute what is missing under `cache`; rank 0 gets the whole set, the others None once nothing is left to do.

    Raises:
        UserError: the folder cannot be written, or whatever `compute` raises.
    """
    folder = cache / figures.digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", "a writable folder", "set --cache") from error
    if ranks.is_main and not (folder / "key.json").exists():
        write_json(folder / "key.json", figures.key)
    pending = [b for b in range(block_count(figures.count)) if not block_path(folder, b).exists()]
    pending.sort(key=lambda block: block % ranks.world != ranks.rank)  # one's own share first
    left = sum(block_size(block, figures.count) for block in pending)
    progress = Progress(
        figures.count, "images", figures.label, done=figures.count - left, enabled=ranks.is_main and bool(pending)
    )
    while pending:
        claimed_elsewhere = []
        for block in pending:
            if _try_block(figures, folder, block):
                progress.advance(block_size(block, figures.count))
            else:
                claimed_elsewhere.append(block)
        pending = claimed_elsewhere
        if pending and not ranks.is_main:
            return None
        if pending:
            time.sleep(POLL_S)
    progress.close()
    for claim in folder.glob("*.claim"):
        claim.unlink(missing_ok=True)
    return FigureSet(folder, figures.count) if ranks.is_main else None


def block_count(count: int) -> int:
    """How many blocks N images make."""
    return -(-count // BLOCK)


def block_size(block: int, count: int) -> int:
    """How many images a block holds."""
    return min(BLOCK, count - block * BLOCK)


def block_path(folder: Path, block: int) -> Path:
    """The file of a block."""
    return folder / f"block-{block:06d}.npz"


def _try_block(figures: Figures, folder: Path, block: int) -> bool:
    """Whether the block is there now; False if another process has claimed it."""
    path = block_path(folder, block)
    if path.exists():
        return True
    with _claim(folder / f"{block:06d}.claim") as ours:
        if not ours:
            return False
        if not path.exists():
            content, arrays = figures.compute(block * BLOCK, min((block + 1) * BLOCK, figures.count))
            with atomic_write(path) as file:
                np.savez(file, **{CONTENT: np.frombuffer(content, np.uint8)}, **arrays)
    return True


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Hold a lock that falls with the process; yields whether it was free."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks: at worst two processes write the same bytes
        yield True
