"""Reading files of weights without running code that they may hold, and loading them whole or not at all."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.errors import UserError

SHOWN = 3


def read_weights_file(path: str | Path, *, lazy: bool = False) -> Any:
    """What a `.safetensors` or a `.pt` file holds, on the CPU; pickled code is refused, not run.

    Args:
        path: the file.
        lazy: the tensors of a `.pt` are read from the disk as they are looked at.

    Raises:
        UserError: the file is missing, truncated, not of either format, or holds more than tensors and plain values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        # Official configs name the released files by this folder.
        released = path.parts[:1] == ("models",)
        raise UserError(
            f"{path} does not exist",
            "a .pt or .safetensors file of weights",
            f"if it is a released one: python tools/convert.py fetch {path}" if released else "",
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except pickle.UnpicklingError as error:
        # torch's own message is a page that ends with advice to run the code.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} cannot be read as weights{f': it asks for {wanted.group(1)}' if wanted else ''}",
            "tensors and plain values only",
            "it is corrupt, or holds pickled code, which is never run",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read: {reason}", "a whole .pt or .safetensors file", "copy it again"
        ) from error


def select_weights(content: Any, source: str | Path, which: str = "ema") -> dict[str, Tensor]:
    """The state dict in what a file holds: a bare one, or `ema` or `model` of a training checkpoint.

    Prefixes of wrappers (`module.` of DDP, `_orig_mod.` of torch.compile) are taken off.

    Args:
        content: what `read_weights_file` returned.
        source: file that the message names.
        which: `ema`, falling back to `model` where the checkpoint has no average, or `model`.

    Raises:
        UserError: nothing in it is a state dict, or names collide without their prefixes.
    """
    held = content
    if isinstance(content, Mapping):
        held = next((content[key] for key in (which, "model") if isinstance(content.get(key), Mapping)), content)
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        keys = ", ".join(map(str, list(held)[:SHOWN])) if isinstance(held, Mapping) else type(held).__name__
        raise UserError(f"{source} holds {keys or 'nothing'}", "a state dict, or a checkpoint with `ema` or `model`")
    bare = {str(name).replace("_orig_mod.", "").removeprefix("module."): value for name, value in held.items()}
    if len(bare) < len(held):
        raise UserError(f"{source}: names collide once module. and _orig_mod. are taken off", "one model's weights")
    return bare


def read_statistics(
    path: str | Path, latent_shape: tuple[int, ...] | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(mean, var) of a file of latent statistics, as stat.pt; an entry that is missing or None is None.

    Args:
        path: `.pt` or `.safetensors`.
        latent_shape: [C, H, W] that both must broadcast to; None: any.

    Raises:
        UserError: not a mapping with `mean` or `var`, of another size, not finite, or a variance below zero.
    """
    content = read_weights_file(path)
    if not isinstance(content, Mapping) or not {"mean", "var"} & set(content):
        keys = ", ".join(map(str, list(content)[:SHOWN])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{path} holds {keys or 'nothing'}", "a mapping with `mean` and `var`, as stat.pt has")
    mean, var = content.get("mean"), content.get("var")
    for name, tensor in (("mean", mean), ("var", var)):
        if tensor is None:
            continue
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and bool(torch.isfinite(tensor).all())):
            raise UserError(f"{path}: `{name}` is not a tensor of finite numbers", "finite latent statistics")
        if latent_shape is not None and not _broadcasts(tensor, latent_shape):
            raise UserError(
                f"{path}: `{name}` has shape {list(tensor.shape)}, but the encoder makes latents {list(latent_shape)}",
                f"shape {list(latent_shape)}",
                "change the file (stage_1.params.normalization_stat_path or cache.statistics) or encoder_input_size",
            )
    if var is not None and bool((var < 0).any()):
        raise UserError(f"{path}: `var` has negative entries", "variances", "`var` must not hold standard deviations")
    return mean, var


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        return torch.broadcast_shapes(tensor.shape, shape) == shape
    except RuntimeError:
        return False


def load_strictly(module: nn.Module, tensors: Mapping[str, Any], source: str | Path, cause: str = "") -> None:
    """Copy `tensors` into `module` if names and shapes agree exactly; otherwise leave the module as it is.

    Args:
        module: parameters and buffers to fill.
        tensors: a state dict.
        source: file that the message names.
        cause: what most likely explains a mismatch.

    Raises:
        UserError: see `check_fit`.
    """
    check_fit(module, tensors, source, cause)
    module.load_state_dict(dict(tensors), strict=True)


def check_fit(module: nn.Module, tensors: Mapping[str, Any], source: str | Path, cause: str = "") -> None:
    """Refuse a state dict whose names and shapes are not the module's; arguments as `load_strictly`.

    Raises:
        UserError: the first three missing, surplus or differently shaped names, with shapes.
    """
    wanted = module.state_dict()
    found = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    differences = [
        *(f"{name} {list(wanted[name].shape)} is missing" for name in wanted if name not in found),
        *(f"{name} is surplus" for name in tensors if name not in wanted),
        *(
            f"{name} is {list(found[name].shape)}, not {list(wanted[name].shape)}"
            for name in wanted
            if name in found and found[name].shape != wanted[name].shape
        ),
    ]
    if differences:
        shown = "; ".join(differences[:SHOWN])
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise UserError(
            f"{source} does not fit {type(module).__name__}: {shown}{more}",
            f"the {len(wanted)} tensors of the configured model",
            cause or "check that the sizes in the config are those the weights were trained with",
        )
