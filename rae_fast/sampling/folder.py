"""The folder that many ranks fill: begun once, by one of them, and never with two kinds of content.

Shapes: S side of an image, n images of a batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from rae_fast.errors import UserError
from rae_fast.provenance import read_json, write_json
from rae_fast.runtime import Ranks

BEGIN_TIMEOUT_S = 1800.0  # for rank 0 to begin the folder: it may have to hash gigabytes first
READ_BATCH, READERS = 64, 4


def begin(
    path: Path,
    manifest: dict[str, Any],
    identity: Sequence[str],
    ranks: Ranks,
    *,
    prepare: Callable[[], None] = lambda: None,
    ready: Callable[[], bool] = lambda: True,
) -> None:
    """Write the manifest at `path`, or check the one that is there; other ranks wait for rank 0.

    Args:
        path: of the manifest.
        manifest: what the folder's content depends on, and with what it is made.
        identity: keys that must agree between the run that began the folder and those that go on with it.
        ranks: this process among all.
        prepare: called on rank 0 before the manifest is written; may refuse by raising.
        ready: whether what `prepare` makes is there.

    Raises:
        UserError: the folder's content is of something else, or rank 0 does not come.
    """
    if path.exists():
        _check_identity(path, manifest, identity)
    if ranks.is_main:
        prepare()
        write_json(path, manifest)
        return
    deadline_s = time.monotonic() + BEGIN_TIMEOUT_S
    while not (path.exists() and ready()):
        if time.monotonic() > deadline_s:
            raise UserError(f"rank 0 has not begun {path.parent}", "one --folder for all ranks, seen by all of them")
        time.sleep(0.2)
    _check_identity(path, manifest, identity)


def _check_identity(path: Path, manifest: dict[str, Any], identity: Sequence[str]) -> None:
    before = read_json(path)
    for key in identity:
        if before.get(key) != manifest[key]:
            raise UserError(
                f"{path.parent} was begun with {key} {before.get(key)}",
                f"{manifest[key]}",
                "give another --folder, or remove this one",
            )


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a place without room or rights."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}",
        "a writable folder with room",
        "make room; the same command goes on from here",
    )


def remove_stale_parts(folder: Path) -> None:
    """Remove half-written files of a run that was killed: those older than this process."""
    # The system counts a process's start from a boot time in whole seconds: up to one too early. Within its first
    # second no rank of this run writes anything.
    started_s = psutil.Process().create_time() + 1
    for part in folder.glob(".*.part"):
        if part.stat().st_mtime < started_s:
            part.unlink(missing_ok=True)


def read_images(folder: Path, numbers: Sequence[int] | range) -> Iterator[np.ndarray]:
    """Images `<number>.png` of a folder, uint8 [n, S, S, 3] at a time, decoded in threads.

    Raises:
        UserError: one is damaged.
    """
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1), "read") as pool:
        for start in range(0, len(numbers), READ_BATCH):
            paths = [folder / f"{i:06d}.png" for i in numbers[start : start + READ_BATCH]]
            yield np.stack(list(pool.map(_read_image, paths)))


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error}", "the image that was made", "remove it and run again"
        ) from error
