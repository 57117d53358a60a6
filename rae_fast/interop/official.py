"""Files of bytetriper/RAE: reading its checkpoints, and writing ours so that its loaders take them.

Released DiT: a bare state dict. Training checkpoint `ep-0000001.pt`: step, epoch, model, ema, optimizer, scheduler;
stage 1 adds disc, disc_optimizer, disc_scheduler, and its model and ema hold the encoder too. Released decoder: the
bare state dict of the decoder. `stat.pt`: mean and var, either of which may be missing or None.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.autoencoder.decoder import read_decoder_weights
from rae_fast.config_file import load_config
from rae_fast.dit.registry import build_dit
from rae_fast.errors import UserError
from rae_fast.geometry import dit_params, resolve_geometry
from rae_fast.latents.stats import save_statistics
from rae_fast.provenance import atomic_write
from rae_fast.runtime import DTYPES
from rae_fast.weights import check_fit, load_strictly, read_statistics, read_weights_file, select_weights

WEIGHTS = ("ema", "model")


def read_dit_weights(path: str | Path, which: str = "ema") -> dict[str, Tensor]:
    """State dict of a DiT under the reference's names, on the CPU.

    Args:
        path: a bare state dict, {model, ema, ...}, a training checkpoint, or .safetensors.
        which: `ema` or `model`, where the file has both.

    Raises:
        UserError: the file cannot be read or holds no state dict.
    """
    if which not in WEIGHTS:
        raise UserError(f"weights {which!r}", f"one of {', '.join(WEIGHTS)}")
    return select_weights(read_weights_file(path), path, which)


def load_dit_weights(model: nn.Module, path: str | Path, which: str = "ema") -> None:
    """Load a DiT's weights whole, or leave the model as it was.

    Raises:
        UserError: the file cannot be read; or names or shapes differ, with the first three and the likely cause.
    """
    tensors = read_dit_weights(path, which)
    load_strictly(model, tensors, path, likely_cause(model.state_dict(), tensors))


def likely_cause(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What most likely explains that a file's tensors are not a DiT's; empty if they are."""
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if {name: tuple(value.shape) for name, value in wanted.items()} == shapes:
        return ""
    if any(name.startswith(("decoder.", "decoder_layers.")) for name in found):
        return "this is a stage-1 checkpoint: give it as stage_1.ckpt"
    if ("s_embedder.proj.weight" in wanted) != ("s_embedder.proj.weight" in found):
        return "one is a DiTDH and the other a LightningDiT: check stage_2.target"
    flags = "mlp_ratio, use_qknorm, use_swiglu, use_rope, use_rmsnorm, wo_shift, use_pos_embed"
    return f"check stage_2.params: {', '.join(_differing_sizes(wanted, found)) or flags}"


def _differing_sizes(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The constructor arguments that differ, as far as one tensor each tells them."""
    sizes = (
        ("hidden_size", "y_embedder.embedding_table.weight", 1),
        ("hidden_size", "x_embedder.proj.weight", 0),
        ("num_classes or class_dropout_prob (0 leaves the null row out)", "y_embedder.embedding_table.weight", 0),
        ("input_size or patch_size, by tokens", "pos_embed", 1),
        ("in_channels", "x_embedder.proj.weight", 1),
        ("patch_size", "x_embedder.proj.weight", 2),
    )
    pairs = [("depth, in blocks", _blocks(wanted), _blocks(found))]
    pairs += [
        (name, wanted[key].shape[i], found[key].shape[i])
        for name, key, i in sizes
        if key in wanted and key in found and found[key].ndim > i
    ]
    return [f"{name} ({ours} configured, {theirs} in the file)" for name, ours, theirs in pairs if ours != theirs]


def check_dit(path: str | Path, config_file: str | Path, which: str = "ema") -> None:
    """Refuse weights that are not of the model that a config describes; nothing is built in memory.

    Raises:
        UserError: see `load_dit_weights`.
    """
    config = load_config(config_file)
    with torch.device("meta"):
        model = build_dit(config.stage_2.target, dit_params(config, resolve_geometry(config)))
    tensors = read_dit_weights(path, which)
    check_fit(model, tensors, path, likely_cause(model.state_dict(), tensors))


def _blocks(names: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], dtype: str | None = None) -> None:
    """Write a bare state dict, atomically: `.safetensors` or, with any other ending, as `torch.save` does.

    Args:
        path: where to.
        tensors: by name; what shares memory is written out in full.
        dtype: fp32, bf16 or fp16 for floating-point tensors; None leaves them as they are.

    Raises:
        UserError: unknown dtype, or the place cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    kept = OrderedDict((name, _detached(value, dtype)) for name, value in tensors.items())
    path = Path(path)
    if path.suffix == ".safetensors":
        save_safetensors(path, kept)
    else:
        save_content(path, kept)


def _detached(value: Tensor, dtype: str | None) -> Tensor:
    value = value.detach().cpu()
    if dtype is not None and value.is_floating_point():
        value = value.to(DTYPES[dtype])
    return value.clone(memory_format=torch.contiguous_format)


def save_content(path: str | Path, content: Any) -> None:
    """`torch.save`, atomically."""
    with atomic_write(path) as file:
        torch.save(content, file)


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous CPU tensors that share no memory, without a second copy of them; atomically.

    Raises:
        UserError: the place cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}", "a writable folder with room for it") from error
    finally:
        part.unlink(missing_ok=True)


def convert_dit(source: str | Path, target: str | Path, which: str = "ema", dtype: str | None = None) -> int:
    """Take the DiT's weights out of any file of the reference or ours, and write them bare; returns their number."""
    tensors = read_dit_weights(source, which)
    save_weights(target, tensors, dtype)
    return len(tensors)


def convert_decoder(source: str | Path, target: str | Path, which: str = "ema", dtype: str | None = None) -> int:
    """Take the decoder out of a stage-1 checkpoint or a bare file, and write it bare; returns the number of tensors.

    Raises:
        UserError: the file holds no decoder.
    """
    tensors = read_decoder_weights(source, which)
    if "decoder_pred.weight" not in tensors:
        raise UserError(
            f"{source} holds {', '.join(list(tensors)[:3])}", "a decoder (decoder_pred.weight, ...)", "check the file"
        )
    save_weights(target, tensors, dtype)
    return len(tensors)


def convert_statistics(source: str | Path, target: str | Path) -> tuple[int, ...]:
    """Rewrite latent statistics as stat.pt with both entries, or as .safetensors; returns their shape."""
    mean, var = read_statistics(source)
    given = {name: value for name, value in (("mean", mean), ("var", var)) if value is not None}
    if Path(target).suffix == ".safetensors":
        save_weights(target, given)
    else:
        save_statistics(target, mean, var)
    return tuple(next(iter(given.values())).shape)
