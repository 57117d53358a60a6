"""Which configuration a kernel runs in: measured once, written down, the same on every rank.

`tuned.json` beside this file is part of the source; what a user's own GPU measured is in a cache file that adds to it.
A configuration is found by (GPU, Triton version, operation, shape, dtype), else the caller's default applies: ranks
that time for themselves could pick different tilings and drift apart in the last bits.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

COMMITTED = Path(__file__).with_name("tuned.json")
FORMAT = 1

Config = dict[str, Any]
Key = tuple[str, str, str, str, str]


def lookup(
    operation: str, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device, default: Config
) -> Config:
    """The configuration measured for this operation here, or `default`.

    Args:
        operation: name and direction, such as "attention.forward".
        shape: what the choice depends on, by name.
        dtype: type of the main input.
        device: where it will run.
        default: the answer where nothing was measured.
    """
    if device.type != "cuda":
        return default
    return table().get(_key(operation, shape, dtype, device), default)


def known(operation: str, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this operation was measured on this kind of GPU."""
    return device.type == "cuda" and _key(operation, shape, dtype, device) in table()


def describe(shape: Mapping[str, int]) -> str:
    """A shape as written in the table: {"tokens": 256, "head": 72} -> "tokens=256 head=72"."""
    return " ".join(f"{k}={int(v)}" for k, v in shape.items())


def name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def table() -> dict[Key, Config]:
    """All measured configurations, the user's own over the committed ones."""
    return read(COMMITTED) | read(cache_path())


def cache_path() -> Path:
    """Where configurations measured on this machine are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rae_fast" / "tuned.json"


def read(path: Path) -> dict[Key, Config]:
    """The entries of one table; none if the file does not exist.

    Raises:
        ValueError: the file is no table of this format.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {FORMAT} expected; delete the file, and the kernels tune again")
    return {(e["gpu"], e["triton"], e["op"], e["shape"], e["dtype"]): e["config"] for e in content["entries"]}


def write(path: Path, entries: Mapping[Key, Config]) -> None:
    """Write a table whole, in order of its keys: readers see the old one or the new one."""
    fields = ("gpu", "triton", "op", "shape", "dtype")
    rows = [dict(zip(fields, key, strict=True)) | {"config": config} for key, config in sorted(entries.items())]
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"format": {FORMAT}, "entries": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def fastest(candidates: Iterable[Config], seconds: Callable[[Config], float]) -> tuple[Config, dict[str, float]]:
    """The configuration that `seconds` times lowest, and all times by configuration.

    A candidate that does not fit the GPU (it asks for more shared memory or registers than there are), or that this
    version of Triton cannot compile, is left out.

    Raises:
        ValueError: no candidate runs.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    times: dict[str, tuple[float, Config]] = {}
    refused = []
    for config in candidates:
        try:
            times[json.dumps(config, sort_keys=True)] = (seconds(config), config)
        # A pass of the compiler that fails says so by a bare RuntimeError.
        except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:
            refused.append(f"{config}: {error}")
    if not times:
        raise ValueError(f"no candidate runs on this GPU: {'; '.join(refused)}")
    best = min(times.values(), key=lambda pair: pair[0])[1]
    return best, {key: value for key, (value, _) in times.items()}


def record(
    operation: str, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device, config: Config, path: Path
) -> None:
    """Add one measured configuration to the table at `path` and to this process."""
    entries, key = read(path), _key(operation, shape, dtype, device)
    entries[key] = config
    write(path, entries)
    table()[key] = config


def agree() -> None:
    """Give every rank rank 0's table, so that all run the same kernels."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if torch.distributed.get_rank() == 0:
        torch.distributed.broadcast_object_list([table()], src=0)
        return
    box: list[Any] = [None]
    torch.distributed.broadcast_object_list(box, src=0)
    table().clear()
    table().update(box[0])


def _key(operation: str, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Key:
    return (*_machine(device.index or 0), operation, describe(shape), name(dtype))


@functools.cache
def _machine(device_index: int) -> tuple[str, str]:
    """(GPU name, Triton version): what a measurement holds for."""
    import triton

    return torch.cuda.get_device_name(device_index), ".".join(triton.__version__.split(".")[:2])
