"""One builder at a time on a store.

All ranks of a builder hold a shared flock on one file; a new builder needs it exclusively for a moment. The kernel
drops the locks of a process that dies, however it dies, so a killed build never blocks its resume.

Object stores have no locks: there rank 0 puts an object anew every few seconds, and a new builder that finds one first
looks whether it changes; one that lies still was left behind by a builder that died. Two that begin within the same
second may both go on, and then write the same bytes twice, since every put is atomic and every shard deterministic.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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
BEAT_S, SILENT_BEATS = 5.0, 3  # of a builder on an object store


@contextmanager
def builder_lock(
    storage: Storage, ranks: Ranks, prepare: Callable[[], Prepared], patience_s: float = PATIENCE_S
) -> Iterator[Prepared]:
    """Hold the store for this builder and call `prepare`, on rank 0 before any other rank; gives what that returned.

    Rank 0 takes the file exclusively, prepares, writes a nonce into it, tells the nonce to the other ranks, and keeps a
    shared lock; the others take shared locks on the file with that nonce. On an object store rank 0 alone keeps others
    away.

    Raises:
        UserError: another builder holds the store.
    """
    if not isinstance(storage, LocalStorage):
        with _beating(storage) if ranks.is_main else nullcontext():
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


@contextmanager
def _beating(storage: Storage) -> Iterator[None]:
    """Put a new value under the lock's key every BEAT_S seconds until the block ends, then remove it."""
    _await_stillness(storage)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            # A beat that fails is no reason to end a build: the next one may get through, as may the shards.
            with suppress(OSError):
                storage.write(LOCK, secrets.token_hex(16).encode())

    storage.write(LOCK, secrets.token_hex(16).encode())
    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):  # left behind, it costs the next builder a moment, and hides no error of this one
            storage.delete(LOCK)


def _await_stillness(storage: Storage) -> None:
    """Return once the lock's object is absent, or has not changed for several beats."""
    found = _value(storage)
    if not found:
        return
    print(
        f"{storage.url}: a builder left its lock; looking for {SILENT_BEATS * BEAT_S:g} s whether it lives", flush=True
    )
    until_s = time.monotonic() + SILENT_BEATS * BEAT_S
    while time.monotonic() < until_s:
        time.sleep(BEAT_S / 2)
        now = _value(storage)
        if not now:
            return
        if now != found:
            raise _busy(storage)


def _value(storage: Storage) -> bytes:
    try:
        return storage.read(LOCK)
    except FileNotFoundError:
        return b""


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


def _busy(storage: Storage) -> UserError:
    return UserError(
        f"another builder is at work on {storage.url}",
        "one builder at a time",
        "wait for it to end, or stop it",
    )
