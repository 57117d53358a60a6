"""Every byte of a store against what was written."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rae_fast.latents.checksum import crc32c, crc32c_file
from rae_fast.latents.layout import BACKUP, MANIFEST, WORK, Plane
from rae_fast.latents.manifest import (
    Checks,
    DamagedError,
    HeadOverlay,
    backup_bytes,
    intact_head,
    parse_manifest,
    read_backup,
)
from rae_fast.latents.shard import read_index
from rae_fast.latents.storage import Storage, open_storage
from rae_fast.latents.store import ROOT, LatentStore, absent, damaged, incomplete
from rae_fast.progress import Progress

VERIFY_THREADS = 8


@dataclass
class Damage:
    """One file that is not what was written.

    Attributes:
        key: the file.
        problem: what is wrong with it.
        shard: number of the shard that it belongs to, None for the small files.
        plane: name of the plane that it belongs to.
        rows: rows of the store that are affected, where that is known.
    """

    key: str
    problem: str
    shard: int | None = None
    plane: str | None = None
    rows: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        place = "" if self.shard is None else f"shard {self.shard} of {self.plane}: "
        rows = (
            f" (rows {', '.join(map(str, self.rows[:8]))}{', ...' if len(self.rows) > 8 else ''})" if self.rows else ""
        )
        return f"{place}{self.key} {self.problem}{rows}"


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        files, size_bytes: how much was checked.
        damages: what is not as it was written.
        strays: files that do not belong to the store.
    """

    files: int
    size_bytes: int
    damages: list[Damage]
    strays: list[str]


def verify(url: str, *, threads: int = VERIFY_THREADS, show_progress: bool = False) -> VerifyReport:
    """Check all files of a complete store against their checksums.

    Raises:
        UserError: there is no complete store, or neither the manifest nor its backup can be read.
    """
    storage = open_storage(url)
    checks, damages = trusted_checks(storage)
    progress = Progress(len(checks), "files", "verify", enabled=show_progress)

    def check(key: str) -> str | None:
        problem = _problem(storage, key, checks[key])
        progress.advance(1)
        return problem

    with ThreadPoolExecutor(threads) as pool:
        problems = dict(zip(checks, pool.map(check, checks), strict=True))
    progress.close()
    damages += _describe(storage, {key: problem for key, problem in problems.items() if problem}, checks)
    backup = _backup_problem(storage, checks)
    if backup:
        damages.append(Damage(BACKUP, backup))
    known = {*checks, MANIFEST, BACKUP}
    strays = [key for key in storage.list() if key not in known and not key.startswith(f"{WORK}/")]
    return VerifyReport(len(checks) + 2, sum(size for size, _ in checks.values()), damages, strays)


def trusted_checks(storage: Storage) -> tuple[Checks, list[Damage]]:
    """The manifest, or the backup's copy of it if it is damaged.

    Raises:
        UserError: there is no complete store, or both are damaged.
    """
    try:
        return parse_manifest(storage.read(MANIFEST), storage.url), []
    except FileNotFoundError as error:
        if storage.size(BACKUP) is None:  # written before the manifest: the build never came so far
            raise (absent if storage.size(ROOT) is None else incomplete)(storage) from error
        problem = "is missing"
    except DamagedError:
        problem = "is damaged"
    try:
        return parse_manifest(read_backup(storage)[MANIFEST], storage.url), [Damage(MANIFEST, problem)]
    except (DamagedError, KeyError) as error:
        raise damaged(storage, f"{MANIFEST} {problem}, and {BACKUP} does not have it") from error


def _problem(storage: Storage, key: str, expected: tuple[int, int]) -> str | None:
    try:
        size, crc = crc32c_file(storage, key)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if size != expected[0]:
        return f"has {size} bytes instead of {expected[0]}"
    return None if crc == expected[1] else "does not match its checksum"


def _backup_problem(storage: Storage, checks: Checks) -> str | None:
    try:
        raw = storage.read(BACKUP)
        files = read_backup(storage)
    except (FileNotFoundError, DamagedError):
        return "is missing or damaged"
    intact = backup_bytes(files) == raw and all(
        checks[key] == (len(data), crc32c(data)) if key in checks else key == MANIFEST for key, data in files.items()
    )
    return None if intact and MANIFEST in files else "is damaged"


def _describe(storage: Storage, problems: dict[str, str], checks: Checks) -> list[Damage]:
    """Name shard, plane and rows of each damaged file, as far as the small files are whole enough to tell."""
    if not problems:
        return []
    try:
        store = open_intact(storage, checks)
    except DamagedError:
        return [Damage(key, problem) for key, problem in problems.items()]
    return [_describe_one(store, key, problem) for key, problem in problems.items()]


def open_intact(storage: Storage, checks: Checks) -> LatentStore:
    """The store with its small files as they were written, wherever an intact copy of them is.

    Raises:
        DamagedError: a small file is damaged, and its copy in the backup too.
    """
    head = intact_head(storage, checks)
    return LatentStore(HeadOverlay(storage, head), json.loads(head[ROOT])["attributes"], checks)


def open_intact_url(url: str) -> LatentStore:
    """`open_intact` of the store at an URL.

    Raises:
        UserError: there is no complete store, or a small file is damaged beyond its backup.
    """
    storage = open_storage(url)
    checks, _ = trusted_checks(storage)
    try:
        return open_intact(storage, checks)
    except DamagedError as error:
        raise damaged(storage, str(error)) from error


def _describe_one(store: LatentStore, key: str, problem: str) -> Damage:
    for plane in store.planes.values():
        shard = shard_of(plane, key)
        if shard is not None:
            rows = _bad_rows(store, plane, shard) if key == plane.shard_key(shard) else []
            return Damage(key, problem, shard, plane.name, rows)
    return Damage(key, problem)


def shard_of(plane: Plane, key: str) -> int | None:
    """The shard of this plane that a file belongs to, None if it is another file."""
    prefixes = [f"{plane.array}/c/"] + ([f"{plane.scale_array}/c/"] if plane.scale_array else [])
    for prefix in prefixes:
        number = key.removeprefix(prefix).split("/")[0]
        if key.startswith(prefix) and number.isdigit():
            return int(number)
    return None


def _bad_rows(store: LatentStore, plane: Plane, shard: int) -> list[int]:
    """Rows of a damaged shard that fail their own checksums."""
    rows = range(shard * store.shard_size, min((shard + 1) * store.shard_size, store.n))
    try:
        index = read_index(store.storage, plane, shard, store.shard_size)
        expected = store.crcs(plane)
        scales = store.storage.read(plane.scale_key(shard)) if plane.scale_array else b""
        data = store.storage.read(plane.shard_key(shard))
    except (FileNotFoundError, ValueError):
        return list(rows)
    bad = []
    for slot, row in enumerate(rows):
        offset, size = int(index["offset"][slot]), int(index["nbytes"][slot])
        crc = crc32c(data[offset : offset + size])
        if plane.scale_array:
            crc = crc32c(scales[slot * plane.scale_bytes : (slot + 1) * plane.scale_bytes], crc)
        if crc != int(expected[row]):
            bad.append(row)
    return bad
