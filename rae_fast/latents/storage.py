"""Keys and bytes: the two places a store can live in, a local folder or an object store, behind one small face.

A file appears under its key whole or not at all: locally by temporary name, fsync, rename and fsync of the folder; on
an object store because a put is atomic.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from rae_fast.errors import UserError

TEMPORARY = ".part"  # suffix of files that are being written; whoever finds one at rest may delete it


class Storage(Protocol):
    """A flat map from keys ("latents/original/zarr.json") to bytes."""

    url: str
    is_local: bool

    def read(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, or of a range of it.

        Raises:
            FileNotFoundError: there is no such key.
        """

    def write(self, key: str, data: bytes) -> None:
        """Put a whole file in place, atomically."""

    def create(self, key: str) -> Any:
        """Context manager of a binary file that appears under `key` when the block ends without an exception."""

    def size(self, key: str) -> int | None:
        """Size in bytes, None if there is no such key."""

    def list(self, prefix: str = "") -> list[str]:
        """All keys below a folder, sorted."""

    def walk(self, prefix: str = "") -> Iterator[str]:
        """The same keys one by one, in any order."""

    def delete(self, key: str) -> None:
        """Remove a file; nothing happens if it is absent."""

    def delete_folder(self, prefix: str) -> None:
        """Remove all files below a folder, and the folder."""

    def free_bytes(self) -> int | None:
        """Room left for new files, None where that is unknown."""


def open_storage(url: str | Path) -> Storage:
    """The storage behind a local path or an URL such as s3://bucket/path.

    Raises:
        UserError: the URL's scheme is unknown, or the package that serves it is missing.
    """
    url = str(url)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    return ObjectStorage(url) if "://" in url else LocalStorage(Path(url))


class LocalStorage:
    """A folder."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def path(self, key: str) -> Path:
        """The file behind a key."""
        return self.root / key

    def read(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        with self.path(key).open("rb") as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)

    def write(self, key: str, data: bytes) -> None:
        with self.create(key) as file:
            file.write(data)

    @contextmanager
    def create(self, key: str) -> Iterator[IO[bytes]]:
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).chmod(0o644)
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def size(self, key: str) -> int | None:
        try:
            return self.path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.walk(prefix))

    def walk(self, prefix: str = "") -> Iterator[str]:
        for folder, _, names in os.walk(self.root / prefix):
            base = Path(folder).relative_to(self.root)
            yield from (str(PurePosixPath(base / name)) for name in names)

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        stats = os.statvfs(folder)
        return stats.f_bavail * stats.f_frsize

    def delete_folder(self, prefix: str) -> None:
        """Remove a folder and all in it."""
        for folder, folders, names in os.walk(self.root / prefix, topdown=False):
            for name in names:
                (Path(folder) / name).unlink(missing_ok=True)
            for name in folders:
                (Path(folder) / name).rmdir()
        if (self.root / prefix).is_dir():
            (self.root / prefix).rmdir()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UserError(
        f"cannot write {path}: {error.strerror or error}",
        "room for the store" if full else "a writable folder",
        "free some space and run the same command again: finished shards are kept"
        if full
        else "choose another cache.path or mend its rights",
    )


class ObjectStorage:
    """A prefix of an object store (s3://, gs://, memory://), by fsspec.

    A large file is gathered in a local temporary file and put in one piece, since objects cannot grow.
    """

    is_local = False

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self.filesystem, root = url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"cannot open {url}: {error}", "a local path, s3://, gs://, ...", "pip install 'rae_fast[s3]' for s3://"
            ) from error
        self.root = root.rstrip("/")
        # Other processes write too: what was listed a moment ago may be stale.
        self.filesystem.use_listings_cache = False

    def path(self, key: str) -> str:
        """The object's name in fsspec's terms."""
        return f"{self.root}/{key}"

    def read(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        end = None if size is None else offset + size
        return self.filesystem.cat_file(self.path(key), start=offset or None, end=end)

    def read_ranges(self, keys: list[str], starts: list[int], sizes: list[int]) -> list[bytes]:
        """Many ranges at once, concurrently where the filesystem can."""
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        return self.filesystem.cat_ranges([self.path(key) for key in keys], starts, ends, on_error="raise")

    def write(self, key: str, data: bytes) -> None:
        self.filesystem.pipe_file(self.path(key), data)

    @contextmanager
    def create(self, key: str) -> Iterator[IO[bytes]]:
        with tempfile.NamedTemporaryFile(prefix="rae_fast.", suffix=TEMPORARY) as file:
            yield file
            file.flush()
            self.filesystem.put_file(file.name, self.path(key))

    def size(self, key: str) -> int | None:
        self.filesystem.invalidate_cache()
        try:
            return int(self.filesystem.info(self.path(key))["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[str]:
        self.filesystem.invalidate_cache()
        start = len(self.root) + 1
        found = self.filesystem.find(f"{self.root}/{prefix}".rstrip("/"))
        return sorted(name[start:] for name in found)

    def walk(self, prefix: str = "") -> Iterator[str]:
        return iter(self.list(prefix))

    def delete(self, key: str) -> None:
        if self.size(key) is not None:
            self.filesystem.rm_file(self.path(key))

    def delete_folder(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        for key in self.list(prefix):
            self.filesystem.rm_file(self.path(key))

    def free_bytes(self) -> int | None:
        return None
