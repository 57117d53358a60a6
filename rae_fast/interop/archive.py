"""Whole training checkpoints as .safetensors and back, nothing lost: for keeping them without pickle.

A `.pt` holds nested mappings and lists of tensors and plain values. Here the tensors go into one .safetensors under
their paths, and the nesting with the plain values into its metadata as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.interop.official import save_content, save_safetensors
from rae_fast.weights import read_weights_file

FORMAT = "rae_fast.archive.1"
PLAIN = (bool, int, float, str, type(None))


def pack(source: str | Path, target: str | Path) -> int:
    """Write all that a `.pt` holds as one .safetensors; returns the number of tensors.

    Raises:
        UserError: the file cannot be read, or holds what JSON and tensors cannot express.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _take_apart(read_weights_file(source), "", tensors, source)
    save_safetensors(target, tensors, {"format": FORMAT, "skeleton": json.dumps(skeleton)})
    return len(tensors)


def unpack(source: str | Path, target: str | Path) -> int:
    """Write the `.pt` that `pack` read; returns the number of tensors.

    Raises:
        UserError: not a file that `pack` wrote.
    """
    from safetensors import safe_open

    tensors = read_weights_file(source)
    with safe_open(source, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UserError(f"{source} holds weights only", "a whole checkpoint made by this tool", "use: convert.py dit")
    save_content(target, _put_together(json.loads(metadata["skeleton"]), tensors))
    return len(tensors)


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor], source: str | Path) -> Any:
    """JSON that says what `value` is; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        name = path or "tensor"
        while name in tensors:  # a key with a slash in it may spell another's path
            name += "'"
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        # As pairs: keys may be numbers, as those of an optimizer's state.
        return {"pairs": [[key, _take_apart(item, f"{path}/{key}", tensors, source)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take_apart(item, f"{path}/{i}", tensors, source) for i, item in enumerate(value)]}
    if type(value) in PLAIN:
        return value
    raise UserError(f"{source}: {path} is a {type(value).__name__}", "tensors, numbers, texts, lists and mappings")


def _put_together(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "pairs":
        return {key: _put_together(item, tensors) for key, item in content}
    items = [_put_together(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
