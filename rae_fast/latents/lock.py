"""One builder at a time on a store.

All ranks of a builder hold a shared flock on one file; a new builder needs it exclusively for a moment. The kernel
drops the locks of a process that dies, however it dies, so a killed build never blocks its resume.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from rae_fast.errors import UserError
from rae_fast.latents.layout import WORK
from rae_fast.latents.storage import LocalStorage, Storage
from rae_fast.runtime import Ranks, barrier

Prepared = TypeVar("Prepared")
LOCK = f"{WORK}/lock"
POLL_S = 0.05
# A launcher takes a moment to end the other ranks of a build whose first rank was killed.
PATIENCE_S = 5.0


@contextmanager
def builder_lock(
    storage: Storage, ranks: Ranks, prepare: Callable[[], Prepared], patience_s: float = PATIENCE_S
) -> Iterator[Prepared]:
    """Hold the store for this builder and call `prepare`, on rank 0 before any other rank; gives what that returned.

    Rank 0 takes the file exclusively, prepares, writes a nonce into it, tells the nonce to the other ranks, and keeps a
    shared lock; the others take shared locks on the file with that nonce. Object stores have no locks: there two
    builders would write the same bytes twice, since every put is atomic and every shard deterministic.

    Raises:
        UserError: another builder holds the store.
    """
    if not isinstance(storage, LocalStorage):
        prepared = [prepare()] if ranks.is_main else []
        barrier()
        yield prepared[0] if prepared else prepare()
        return
    path = storage.path(LOCK)
    if ranks.is_main:
        handle = _lead(path, storage, patience_s)
        try:
            prepared = prepare()
            nonce = secrets.token_hex(16)
            os.pwrite(handle, nonce.encode(), 0)
            fcntl.flock(handle, fcntl.LOCK_SH)
        except BaseException:
            _share(ranks, "")
            os.close(handle)
            raise
        _share(ranks, nonce)
    else:
        handle = _join(path, _share(ranks, ""))
        prepared = prepare()
    barrier()  # rank 0 may be done at once and remove the file, which the others must have opened before
    try:
        yield prepared
    finally:
        os.close(handle)


def _share(ranks: Ranks, nonce: str) -> str:
    """Rank 0's nonce, on every rank; waits for rank 0."""
    if ranks.world == 1:
        return nonce
    told = [nonce]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


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


def _join(path: Path, nonce: str) -> int:
    """A shared lock on the file that rank 0 holds."""
    if not nonce:
        raise UserError("rank 0 could not begin", "", "see its message")
    try:
        handle = os.open(path, os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.pread(handle, len(nonce), 0).decode() == nonce:
            return handle
        os.close(handle)
    except OSError as error:
        raise _not_shared(path) from error
    raise _not_shared(path)


def _not_shared(path: Path) -> UserError:
    return UserError(
        f"{path} is not the file that rank 0 locked", "all ranks to see one file system", "use shared storage"
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
