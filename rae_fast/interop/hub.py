"""The released weights of bytetriper/RAE on the Hugging Face hub, at a revision that stays the same.

The first download into a folder notes the exact commit in `collection.json` there; every later one takes the same.
"""

from __future__ import annotations

import re
from pathlib import Path

from rae_fast.errors import UserError
from rae_fast.provenance import read_json, sha256_file, write_json

COLLECTION = "nyu-visionx/RAE-collections"
PINNED = "collection.json"
TIMEOUT_S = 20
COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(file: str, folder: str | Path = "models", revision: str | None = None) -> Path:
    """Path of a released file under `folder`, downloaded if it is not there yet.

    Official configs name `models/decoders/...`: with the default folder they find what is fetched here.

    Args:
        file: path within the collection, as decoders/dinov2/wReg_base/ViTXL_n08/model.pt.
        folder: where to keep it.
        revision: commit, tag or branch; None: the one noted in the folder, else the newest.

    Raises:
        UserError: it can be had neither here nor from the hub, or the folder is pinned to another commit.
    """
    folder = Path(folder)
    file = file.removeprefix("models/")
    target, noted = folder / file, _noted(folder)
    if target.is_file():
        return target
    pinned = noted.get("revision")
    if revision is not None and pinned is not None and revision != pinned:
        raise UserError(
            f"{folder / PINNED} pins {pinned}, not {revision}", "one revision in a folder", "use another folder"
        )
    commit = _commit(file, target, revision or pinned)
    _download(file, folder, target, commit)
    files = {**noted.get("files", {}), file: sha256_file(target)}
    write_json(folder / PINNED, {"repository": COLLECTION, "revision": commit, "files": dict(sorted(files.items()))})
    return target


def _noted(folder: Path) -> dict:
    return read_json(folder / PINNED) if (folder / PINNED).is_file() else {}


def _commit(file: str, target: Path, revision: str | None) -> str:
    """The exact commit that a revision stands for now.

    The hub is asked for a commit, too: a download makes folders and tries five times before it says that there is no
    network.
    """
    from huggingface_hub import model_info

    try:
        commit = model_info(COLLECTION, revision=revision, timeout=TIMEOUT_S).sha
    except _hub_errors() as error:
        raise _unavailable(file, target, error, revision) from error
    assert commit is not None
    return revision if revision is not None and COMMIT.fullmatch(revision) else commit


def _download(file: str, folder: Path, target: Path, commit: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(COLLECTION, file, revision=commit, local_dir=folder, etag_timeout=TIMEOUT_S)
    except _hub_errors() as error:
        raise _unavailable(file, target, error, commit) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises without a network: errors of the HTTP library it is built on, which has changed."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError)


def _unavailable(file: str, target: Path, error: Exception, revision: str | None) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{file} of {COLLECTION} is not at {target} and cannot be downloaded: {reason}",
        "a network, or the file in its place",
        f"where there is a network: hf download {COLLECTION} {file} --local-dir models"
        f"{f' --revision {revision}' if revision else ''}; then copy it to {target}",
    )
