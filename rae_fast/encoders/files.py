"""Where an encoder's files lie: a local folder, or a snapshot of the hub at an exact revision."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae_fast.encoders.base import EncoderOptions
from rae_fast.errors import UserError
from rae_fast.provenance import read_json, sha256_file

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = (("*.safetensors",), ("pytorch_model*.bin",))
COMMIT = re.compile(r"[0-9a-f]{40}")


def model_folder(name: str, revision: str | None) -> tuple[Path, str | None]:
    """(folder, exact revision) of a model with its weights, downloaded where it is not here yet.

    Raises:
        UserError: no such folder, and the hub has no such model or cannot be reached.
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return folder, revision
    if folder.is_dir():
        raise UserError(f"{folder} has no {CONFIG}", "a folder in Hugging Face's layout")
    for patterns in WEIGHTS:
        folder = _snapshot(name, revision, patterns, "encoder_params")
        if _weight_files(folder):
            return folder, folder.name if COMMIT.fullmatch(folder.name) else revision
    raise UserError(f"{name} on the hub has no weights", "model.safetensors or pytorch_model.bin")


def processor_folder(name: str) -> Path:
    """Folder of an image processor's configuration, given by local folder or hub id.

    Raises:
        UserError: as `model_folder`.
    """
    return Path(name) if Path(name).is_dir() else _snapshot(name, None, (), "encoder_config_path")


def _snapshot(name: str, revision: str | None, patterns: Sequence[str], key: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, PREPROCESSOR, *patterns]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"stage_1.params.{key}: {name}{f' at {revision}' if revision else ''} is neither a local folder nor to be "
            f"had from the hub: {reason}",
            f"a folder with {CONFIG}, {PREPROCESSOR}{' and model.safetensors' if patterns else ''}",
            f"download it where there is a network (hf download {name}) and set stage_1.params.{key} to its "
            f"folder, or copy it into {constants.HF_HUB_CACHE}",
        ) from error


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a model's configuration if it is on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if (Path(name) / CONFIG).is_file():
        return Path(name)
    try:
        file = try_to_load_from_cache(name, CONFIG, revision=revision)
    except ValueError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def weights_sha256(folder: Path) -> str:
    """Hash of the weight files: for a single file the file's own, as the hub shows it."""
    digests = [sha256_file(file) for file in _weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    for patterns in WEIGHTS:
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
        if files:
            return files
    return []


def image_statistics(options: EncoderOptions, folders: Sequence[Path]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per RGB channel, from the options or the first folder with an image processor.

    Raises:
        UserError: neither the options nor any folder gives them.
    """
    if options.image_mean is not None and options.image_std is not None:
        return options.image_mean, options.image_std
    for folder in folders:
        file = folder / PREPROCESSOR
        if file.is_file():
            content = read_json(file)
            mean, std = content.get("image_mean"), content.get("image_std")
            if not (_three_numbers(mean) and _three_numbers(std)):
                raise UserError(f"{file}: image_mean is {mean}, image_std is {std}", "three numbers each")
            return tuple(mean), tuple(std)
    raise UserError(
        f"none of {', '.join(str(folder) for folder in folders)} has a {PREPROCESSOR}",
        "the image processor's mean and standard deviation",
        "put the file there, or set image_mean and image_std in stage_1.params.encoder_params",
    )


def _three_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(entry, int | float) for entry in value)
