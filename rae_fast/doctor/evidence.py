"""What a run left behind, gathered once for all checks.

Shapes: C, H, W of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.doctor.findings import UNKNOWN, WRONG, Finding
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, resolve_geometry
from rae_fast.interop.official import read_dit_weights
from rae_fast.latents.store import LatentStore, open_store
from rae_fast.provenance import read_json
from rae_fast.runtime import Ranks, pick_device
from rae_fast.training.dit_setup import LABEL_TABLE, with_classes
from rae_fast.training.export import checkpoint_weights
from rae_fast.training.restore import find_damage

DECODER_MARK = "decoder_pred.weight"


@dataclass(frozen=True)
class Evidence:
    """One run, and the config that its samples are drawn with.

    Attributes:
        folder: the run folder.
        trained: the config of the training.
        sampling: the config of the sampling; the training's own unless another one was given.
        geometry: sizes by the training's config and its store.
        sampling_geometry: sizes by the sampling's config.
        manifest: what the run was made from.
        store: the latents that it was trained on, if they are there.
        online: weights of the optimizer.
        ema: weights of the first running average, if one is kept.
        sampled: the weights that are sampled from.
        step: optimizer steps done.
        device: where checks run.
    """

    folder: Path
    trained: Config
    sampling: Config
    geometry: Geometry
    sampling_geometry: Geometry
    manifest: Mapping[str, Any]
    store: LatentStore | None
    online: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    sampled: Mapping[str, Tensor]
    step: int
    device: torch.device

    @property
    def is_decoder(self) -> bool:
        """Whether the run trains a decoder."""
        return DECODER_MARK in self.online


def gather(
    folder: Path, config_file: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Evidence, list[Finding]]:
    """The evidence, and what was wrong with it already.

    Args:
        folder: a run folder.
        config_file: the YAML that is sampled with; None: the run's own.
        overrides: dotted key=value of the sampling.

    Raises:
        UserError: there is no run, no checkpoint in it, or a config that cannot be read.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} has no config.yaml", "the folder of a training run", "give the run's folder")
    trained = load_config(path)
    sampling = load_config(config_file or path, overrides)
    store, findings = _open_store(trained)
    online, ema, step = _weights(folder)
    geometry = _with_table(trained, store, online)
    sampled = online if ema is None else ema
    if sampling.stage_2.ckpt and sampling.stage_2.ckpt != trained.stage_2.ckpt:
        chosen = Path(sampling.stage_2.ckpt)
        sampled = checkpoint_weights(chosen) if chosen.is_dir() else read_dit_weights(chosen)
    evidence = Evidence(
        folder,
        trained,
        sampling,
        geometry,
        _with_table(sampling, store, online),
        read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {},
        store,
        online,
        ema,
        sampled,
        step,
        pick_device(trained.runtime.device),
    )
    return evidence, findings


def _open_store(config: Config) -> tuple[LatentStore | None, list[Finding]]:
    if not config.cache.path:
        return None, [Finding("store", UNKNOWN, "the run was trained online, without a store")]
    try:
        store = open_store(config.cache.path)
    except UserError as error:
        return None, [Finding("store", UNKNOWN, error.found, "checks of latents, encoder and decoder are left out")]
    if not len(store.valid) or not store.valid.any():
        return None, [Finding("store", WRONG, f"{store.url} holds no valid image", "build it again")]
    return store, []


def _weights(folder: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None, int]:
    """(online, first EMA or None, step) of the newest checkpoint."""
    checkpoints = folder / "checkpoints"
    latest = checkpoints / "latest"
    if not latest.is_file():
        raise UserError(f"{folder} holds no checkpoint", "checkpoints/ of a training run", "train first")
    path = checkpoints / latest.read_text().strip()
    damage = find_damage(path, Ranks())
    if damage is not None:
        mend = "remove it: the training command goes on from the one before"
        raise UserError(f"checkpoint {path} is damaged ({damage})", "a whole checkpoint", mend)
    manifest = read_json(path / "manifest.json")
    kinds = manifest["engines"]["model"]["kinds"]
    online = checkpoint_weights(path, ema="online")
    ema = checkpoint_weights(path) if any(kind.startswith("ema/") for kind in kinds) else None
    return online, ema, int(manifest["step"])


def _with_table(config: Config, store: LatentStore | None, weights: Mapping[str, Tensor]) -> Geometry:
    """A config's geometry, with the number of classes where it is left to the data, and a given null label as given."""
    geometry = resolve_geometry(config)
    if geometry.num_classes is not None:
        return geometry
    if store is not None:
        geometry = with_classes(geometry, store.labels, store.class_names, store.url)
    elif LABEL_TABLE in weights:
        classes = len(weights[LABEL_TABLE]) - 1
        geometry = replace(geometry, num_classes=classes, null_label=classes)
    given = config.misc.null_label
    return geometry if given is None else replace(geometry, null_label=given)
