"""The checksums of a finished store, and a backup of all its small files.

`manifest.json` lists size and CRC-32C of every file; it is written last, so its presence says that the store is
complete. `head.backup.tar` holds every file but the shards and their scales, the manifest included: megabytes beside
terabytes, and any flipped bit in them can be mended without the images.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from typing import Any

from rae_fast.errors import UserError
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.layout import BACKUP, FORMAT, FORMAT_VERSION, MANIFEST, canonical_json, is_head
from rae_fast.latents.storage import Storage

Checks = dict[str, tuple[int, int]]  # key -> (size in bytes, CRC-32C)


class DamagedError(ValueError):
    """A file of the store is not what was written."""


def manifest_bytes(checks: Mapping[str, tuple[int, int]]) -> bytes:
    """`manifest.json` over these files."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "files": {key: list(checks[key]) for key in sorted(checks)},
    }
    content["digest"] = _digest(content)
    return canonical_json(content)


def check_format(content: Mapping[str, Any], where: str) -> None:
    """Refuse a store that another version of the format describes.

    Raises:
        UserError: it is no latent store, or of another version.
    """
    found, version = content.get("format"), content.get("format_version")
    if found != FORMAT:
        raise UserError(f"{where} is a zarr group of format {found!r}", FORMAT, "choose another cache.path")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format_version {version}",
            f"{FORMAT_VERSION}, which this version of rae_fast reads and writes",
            "build it anew with another cache.path, or use the version of rae_fast that made it",
        )


def parse_manifest(data: bytes, where: str) -> Checks:
    """The files that the manifest of the store at `where` lists.

    Raises:
        DamagedError: a single byte of it differs from what was written.
        UserError: it is whole, and of another version of the format.
    """
    try:
        content = json.loads(data)
        digest = content.pop("digest")
        intact = digest == _digest(content) and data == canonical_json({**content, "digest": digest})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{MANIFEST} is damaged") from error
    if not intact:
        raise DamagedError(f"{MANIFEST} is damaged")
    check_format(content, where)
    return {key: (size, crc) for key, (size, crc) in content["files"].items()}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def backup_bytes(head: Mapping[str, bytes]) -> bytes:
    """`head.backup.tar` of the small files by key, the manifest among them; depends on nothing but their bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in sorted(head):
            entry = tarfile.TarInfo(key)
            entry.size = len(head[key])
            tar.addfile(entry, io.BytesIO(head[key]))
    return buffer.getvalue()


class HeadOverlay:
    """A storage whose small files are known from elsewhere; all else comes from the storage itself."""

    def __init__(self, storage: Storage, head: Mapping[str, bytes]) -> None:
        self._storage, self._head = storage, head

    def read(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, or of a range of it."""
        if key not in self._head:
            return self._storage.read(key, offset, size)
        return self._head[key][offset:][:size]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def intact_head(storage: Storage, checks: Checks) -> dict[str, bytes]:
    """The small files as they were written, by key, each from its place or else from the backup.

    Raises:
        DamagedError: one of them is damaged in both.
    """
    head: dict[str, bytes] = {}
    backup: dict[str, bytes] | None = None
    for key in filter(is_head, checks):
        try:
            data = storage.read(key)
        except FileNotFoundError:
            data = b""
        if (len(data), crc32c(data)) != checks[key]:
            backup = _backup_or_nothing(storage) if backup is None else backup
            data = backup.get(key, b"")
            if (len(data), crc32c(data)) != checks[key]:
                raise DamagedError(f"{key} is damaged, and so is its copy in {BACKUP}")
        head[key] = data
    return head


def _backup_or_nothing(storage: Storage) -> dict[str, bytes]:
    try:
        return read_backup(storage)
    except DamagedError:
        return {}


def read_backup(storage: Storage) -> dict[str, bytes]:
    """The small files as they were written, by key.

    Raises:
        DamagedError: the backup is missing or not readable.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read(BACKUP))) as tar:
            files = {entry.name: tar.extractfile(entry) for entry in tar.getmembers()}
            return {name: file.read() for name, file in files.items() if file is not None}
    except (FileNotFoundError, tarfile.TarError, OSError) as error:
        raise DamagedError(f"{BACKUP} is damaged") from error
