"""One builder at a time on a store.

All ranks of a builder hold a shared flock on one file; a new builder needs it exclusively for a moment. The kernel
drops the locks of a process that dies, however it dies, so a killed build never blocks its resume.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rae_fast.errors import UserError
from rae_fast.latents.layout import WORK
from rae_fast.latents.storage import LocalStorage, Storage
from rae_fast.runtime import Ranks

LOCK = f"{WORK}/lock"
POLL_S = 0.05
# A launcher takes a moment to end the other ranks of a build whose first rank was killed.
PATIENCE_S = 3.0
JOIN_S = 600.0


def launch_id() -> str:
    """What the ranks of one launch have in common, and no other launch has."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    return "|".join(os.environ.get(name, "") for name in names)


@contextmanager
def builder_lock(
    storage: Storage, ranks: Ranks, prepare: Callable[[], None], patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """Hold the store for this builder and call `prepare`, on rank 0 before any other rank.

    Rank 0 takes the file exclusively, prepares, writes down its launch, and keeps a shared lock; the other ranks join
    with shared locks once their own launch stands there. Object stores have no locks: there two builders would write
    the same bytes twice, since every put is atomic and every shard deterministic.

    Raises:
        UserError: another builder holds the store.
    """
    if not isinstance(storage, LocalStorage):
        prepare()
        yield
        return
    path = storage.path(LOCK)
    handle = _lead(path, storage, patience_s) if ranks.is_main else _join(path, storage)
    try:
        prepare()
        if ranks.is_main:
            _admit(handle)
        yield
    finally:
        os.close(handle)


def _lead(path: Path, storage: LocalStorage, patience_s: float) -> int:
    deadline = time.monotonic() + patience_s
    while True:
        handle = _open(path, storage)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            if time.monotonic() > deadline:
                raise _busy(storage) from error
            time.sleep(POLL_S)
            continue
        if not _is_current(handle, path):
            # A builder that just finished took the file away between our opening and our locking it.
            os.close(handle)
            continue
        os.ftruncate(handle, 0)
        return handle


def _admit(handle: int) -> None:
    """Let the other ranks of this launch in."""
    os.pwrite(handle, f"{launch_id()}\n".encode(), 0)
    fcntl.flock(handle, fcntl.LOCK_SH)


def _join(path: Path, storage: LocalStorage) -> int:
    deadline = time.monotonic() + JOIN_S
    while time.monotonic() < deadline:
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            time.sleep(POLL_S)
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.pread(handle, 4096, 0).decode().startswith(launch_id() + "\n") and _is_current(handle, path):
                return handle
        except BlockingIOError:
            pass
        os.close(handle)
        time.sleep(POLL_S)
    raise UserError(
        f"rank 0 of this launch never took {path}", "all ranks to see one file system", "use shared storage"
    )


def _open(path: Path, storage: LocalStorage) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot write {storage.url}: {error.strerror}",
            "a writable folder",
            "choose another cache.path or mend its rights",
        ) from error


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _busy(storage: LocalStorage) -> UserError:
    return UserError(
        f"another builder is at work on {storage.url}",
        "one builder at a time",
        "wait for it to end, or stop it",
    )
