"""What to draw from: a training run, a config with a checkpoint, or an export beside its run's config.

A run's folder holds all that is needed but the decoder: its config, and its weights as export and checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rae_fast.autoencoder.rae import RAE
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.latents.store import LatentStore
from rae_fast.provenance import read_json
from rae_fast.training.dit_setup import LABEL_TABLE, open_checked_store
from rae_fast.training.previews import decoder_of, has_decoder
from rae_fast.training.restore import newest
from rae_fast.weights import read_statistics, read_weights_file, select_weights

RUN_CONFIG = "config.yaml"


def open_source(
    config_file: str | None,
    run: Path | None,
    weights: Path | None,
    overrides: Sequence[str] = (),
    ema: str | None = None,
) -> Config:
    """The config to sample with: `stage_2.ckpt` names weights that exist, `misc.num_classes` is known.

    Args:
        config_file: YAML, ours or an official one.
        run: folder of a training run; its config is taken, and its newest weights unless `weights` or `overrides` say.
        weights: checkpoint, export, or `checkpoints` folder; without `config_file` and `run`, an export's run is.
        overrides: dotted key=value.
        ema: which of a run's averages is wanted; see `newest_weights`.

    Raises:
        UserError: no run there, no weights in it, a config that contradicts itself.
    """
    if weights is not None and run is None and config_file is None:
        run = _run_of(weights)
    if run is not None and config_file is not None:
        raise UserError("--run together with --config", "one of the two", "a run has its own config; add key=value")
    config = load_config(config_file if run is None else _run_config(run), overrides)
    if weights is not None:
        config = _with_weights(config, weights)
    elif run is not None and not any(override.startswith("stage_2.ckpt=") for override in overrides):
        config = _with_weights(config, newest_weights(run, ema))
    return _with_classes(config)


def open_decoder_source(config_file: str | None, run: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config to reconstruct with; a run of decoder training gives its own, and its exported decoder.

    Raises:
        UserError: no run there, or one that has not exported its decoder.
    """
    if run is None:
        return load_config(config_file, overrides)
    if config_file is not None:
        raise UserError("--run together with --config", "one of the two", "a run has its own config; add key=value")
    config = load_config(_run_config(run), overrides)
    exported = run / "export/model.pt"
    params = config.stage_1.params
    if any(override.startswith(("stage_1.ckpt=", "stage_1.params.pretrained_decoder_path=")) for override in overrides):
        return config
    if not exported.is_file():
        raise UserError(f"{run} has not exported its decoder", f"{exported}", "run its training to the end")
    params = replace(params, pretrained_decoder_path=str(exported))
    # The run may have started from another checkpoint, which would win over what it made of it.
    return replace(config, stage_1=replace(config.stage_1, params=params, ckpt=None))


def newest_weights(run: Path, ema: str | None = None) -> Path:
    """A run's weights: what it exported, or its `checkpoints` folder if that is of a later step.

    Args:
        run: folder of the run.
        ema: decay wanted; an average that was not exported can only come from the checkpoints.

    Raises:
        UserError: neither is there.
    """
    exported = [(_export_facts(path), path) for path in sorted(run.glob("export/ema-*.safetensors"))]
    checkpoints = run / "checkpoints"
    latest = checkpoints / "latest"
    step = int(latest.read_text().strip().removeprefix("step-")) if latest.is_file() else -1
    for facts, path in exported:
        if facts["ema_decay"] == ema and facts["step"] >= step:
            return path
    released = run / "export/stage2_model.pt"
    export_step = max((facts["step"] for facts, _ in exported), default=-1)
    if ema is None and released.is_file() and (export_step >= step or step < 0):
        return released
    if step < 0:
        raise UserError(
            f"{run} holds no {'weights' if ema is None else f'average {ema}'}",
            "export/ or checkpoints/ of a run of tools/train_dit.py",
            "train first",
        )
    return checkpoints


def _export_facts(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("rae_fast", '{"step": -1, "ema_decay": ""}'))


def _run_of(weights: Path) -> Path | None:
    """The run whose export or checkpoint this is, if its config lies where runs have it."""
    return next((folder for folder in weights.resolve().parents[:3] if (folder / RUN_CONFIG).is_file()), None)


def _run_config(run: Path) -> str:
    path = run / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"{run} has no {RUN_CONFIG}", "the folder of a run of tools/train_dit.py", "check the path")
    return str(path)


def _with_weights(config: Config, path: Path) -> Config:
    if not path.exists():
        raise UserError(f"{path} does not exist", "a checkpoint, an export or a checkpoints folder")
    return replace(config, stage_2=replace(config.stage_2, ckpt=str(path)))


# --- number of classes ----------------------------------------------------------------------------------------------


def _with_classes(config: Config) -> Config:
    """The config with `misc.num_classes`; where it is left open, the weights' label table says it."""
    if config.stage_2.ckpt is None:
        raise UserError(
            "stage_2.ckpt is not set", "the checkpoint to sample from", "give --run, or stage_2.ckpt=<file>"
        )
    if config.misc.num_classes is not None or config.stage_2.params.get("num_classes") is not None:
        return config
    has_null_row = float(config.stage_2.params.get("class_dropout_prob", 0.1)) > 0
    classes = _label_rows(Path(config.stage_2.ckpt)) - has_null_row
    return replace(config, misc=replace(config.misc, num_classes=classes))


def _label_rows(path: Path) -> int:
    """Rows of the label table."""
    if path.is_dir():
        return int(read_json(newest(path) / "manifest.json")["engines"]["model"]["shapes"][LABEL_TABLE][0])
    tensors = select_weights(read_weights_file(path, lazy=True), path)
    if LABEL_TABLE not in tensors:
        raise UserError(
            f"{path} holds {', '.join(list(tensors)[:3])}", f"a diffusion transformer ({LABEL_TABLE})", "check the file"
        )
    return len(tensors[LABEL_TABLE])


# --- decoder --------------------------------------------------------------------------------------------------------


def open_decoder(config: Config, device: torch.device) -> RAE:
    """The decoding half of the autoencoder with the statistics that the model's latents were normalized by.

    They are the store's if there is one, else those of `stage_1.params.normalization_stat_path`.

    Raises:
        UserError: no decoder weights, no statistics although the store is named, or two that differ.
    """
    if not has_decoder(config):
        raise UserError(
            "stage_1.params.pretrained_decoder_path is not set",
            "the weights of a trained decoder",
            "set it to <run of train_decoder>/export/model.pt or a released model.pt",
        )
    store = _store_of(config)
    given = config.stage_1.params.normalization_stat_path
    if store is not None and given is not None:
        _check_same_statistics(store, given)
    if store is None and given is None and config.cache.path:
        raise UserError(
            f"cache.path {config.cache.path} is not there, so the latents' statistics are unknown",
            "the store that the model was trained on, or its stat.pt",
            "set cache.path, or stage_1.params.normalization_stat_path (and cache.path=null if there was none)",
        )
    return decoder_of(config, store, device)


def _store_of(config: Config) -> LatentStore | None:
    path = config.cache.path
    if not path or not ("://" in path or Path(path).exists()):
        return None
    from rae_fast.geometry import resolve_geometry

    return open_checked_store(config, resolve_geometry(config))


def _check_same_statistics(store: LatentStore, path: str) -> None:
    mean, var = read_statistics(path)
    for name, ours, theirs in (("mean", store.mean, mean), ("var", store.var, var)):
        default = torch.zeros(()) if name == "mean" else torch.ones(())
        theirs = default if theirs is None else theirs
        if not torch.allclose(ours.float(), theirs.float().expand_as(ours), rtol=1e-4, atol=1e-5):
            raise UserError(
                f"{path}: `{name}` is not that of the store {store.url}",
                "the statistics that the model was trained with",
                "set stage_1.params.normalization_stat_path=null to take the store's, or cache.path=null to take these",
            )
