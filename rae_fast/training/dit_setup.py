"""What a DiT's training starts from: store, model, pretrained weights, and the checks between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_fast.config import Config
from rae_fast.dit.fused import use_kernels
from rae_fast.dit.registry import build_dit
from rae_fast.dit.trunk import DiffusionTransformer
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, dit_params, resolve_geometry
from rae_fast.interop.official import likely_cause, read_dit_weights
from rae_fast.latents.online import OnlineLoader, open_online_loader
from rae_fast.latents.store import LatentStore, check_compatible, open_store
from rae_fast.runtime import Ranks
from rae_fast.training.batching import BatchPlan, ema_decays
from rae_fast.training.deepspeed_setup import read_deepspeed_config, zero_stage
from rae_fast.training.memory import advise, plan_memory
from rae_fast.weights import check_fit, load_strictly, read_weights_file, select_weights

LABEL_TABLE = "y_embedder.embedding_table.weight"


@dataclass(frozen=True)
class TrainingData:
    """What is trained on.

    Attributes:
        geometry: sizes, with the data's number of classes where the config does not say.
        store: the latents; None when they are made online and no store gives their statistics.
        online: the online loader, or None.
        identity: what a run folder keeps to.
        facts: what the run's manifest says.
    """

    geometry: Geometry
    store: LatentStore | None
    online: OnlineLoader | None
    identity: dict[str, Any]
    facts: dict[str, Any]


def open_training_data(config: Config, batches: BatchPlan, ranks: Ranks, device: torch.device) -> TrainingData:
    """Open store or images and check them against the config, before the model takes any memory.

    Raises:
        UserError: sections contradict each other; no store, or one of another latent size, encoder input or number of
            classes; online: images, encoder or statistics cannot be had.
    """
    geometry = resolve_geometry(config)
    shared = {
        "source": config.loader.source,
        "global_batch_size": batches.global_batch,
        "global_seed": config.training.global_seed,
        "shuffle": [getattr(config.loader, key) for key in ("shuffle", "block_size", "flip", "balanced", "classes")],
    }
    if config.loader.source == "online":
        loader = open_online_loader(
            config,
            image_size=geometry.image_size,
            batch_size=batches.micro_batch,
            images_per_step=batches.global_batch,
            seed=config.training.global_seed,
            ranks=ranks,
            device=device,
        )
        geometry = with_classes(geometry, loader.index.labels, loader.index.class_names, loader.index.source)
        dataset = {"images": len(loader.index), "digest": loader.index.digest}
        store = open_store(config.cache.path) if config.cache.path else None
        return TrainingData(geometry, store, loader, {**shared, "dataset": [dataset]}, {"dataset": dataset})
    store = open_checked_store(config, geometry)
    geometry = with_classes(geometry, store.labels, store.class_names, store.url)
    identity = {
        **shared,
        "dataset": store.attrs["dataset"]["segments"],
        "encoder": store.attrs["encoder"].get("weights_sha256"),
        "normalization": store.attrs["normalization"],
    }
    keys = ("num_images", "latent_shape", "views", "codec", "encoder", "normalization", "dataset", "codec_error")
    facts = {"url": store.url, **{key: store.attrs.get(key) for key in keys}}
    return TrainingData(geometry, store, None, identity, facts)


def open_checked_store(config: Config, geometry: Geometry) -> LatentStore:
    """The store of `cache.path`, if it holds what the config says.

    Raises:
        UserError: no store, or one of another latent size or encoder input.
    """
    if not config.cache.path:
        raise UserError("cache.path is not set", "the latent store to train from", "set cache.path=<folder>")
    store = open_store(config.cache.path)
    check_compatible(
        store,
        {
            "latent_shape": list(geometry.latent_shape),
            "encoder.input_size": config.stage_1.params.encoder_input_size,
        },
    )
    return store


def with_classes(geometry: Geometry, labels_N: np.ndarray, class_names: Sequence[str], source: str) -> Geometry:
    """The geometry, with the data's number of classes if the config does not say.

    Raises:
        UserError: labels beyond the number of classes.
    """
    if geometry.num_classes is None:
        classes = max(len(class_names), 1)
        geometry = replace(geometry, num_classes=classes, null_label=classes)
    largest = int(np.max(labels_N, initial=0))
    if largest >= geometry.num_classes:
        raise UserError(
            f"{source} has labels up to {largest}, but the config has {geometry.num_classes} classes",
            f"misc.num_classes {len(class_names)}",
            "set misc.num_classes",
        )
    return geometry


def build_model(config: Config, geometry: Geometry) -> DiffusionTransformer:
    """The model at its seeded initialization, equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.global_seed)
        model = build_dit(config.stage_2.target, dit_params(config, geometry))
    model.activation_checkpointing = config.runtime.activation_checkpointing
    use_kernels(model, config.runtime.kernels)
    return model


def load_pretrained(model: DiffusionTransformer, path: str, *, say: bool = True) -> None:
    """Start from a released or exported checkpoint; for other classes, all but the label table.

    A label table of another size starts fresh, except for its null row, which the checkpoint gives.

    Raises:
        UserError: the file cannot be read, or anything but the label table does not fit.
    """
    tensors = _with_own_labels(model, read_dit_weights(path), path, say)
    load_strictly(model, tensors, path, likely_cause(model.state_dict(), tensors))


def check_pretrained(config: Config, geometry: Geometry) -> None:
    """Refuse a `stage_2.ckpt` that does not fit, before a run is begun; nothing is built in memory.

    Raises:
        UserError: see `load_pretrained`.
    """
    path = config.stage_2.ckpt
    assert path is not None
    with torch.device("meta"):
        model = build_model(config, geometry)
    held = select_weights(read_weights_file(path, lazy=True), path)
    tensors = _with_own_labels(model, held, path, say=False)
    check_fit(model, tensors, path, likely_cause(model.state_dict(), tensors))


def _with_own_labels(
    model: DiffusionTransformer, tensors: dict[str, Tensor], path: str, say: bool
) -> dict[str, Tensor]:
    """A checkpoint's tensors with a fresh label table, where its own is of another number of classes."""
    table = model.y_embedder.embedding_table.weight
    given = tensors.get(LABEL_TABLE)
    if given is not None and given.shape != table.shape and given.shape[1:] == table.shape[1:]:
        fresh = table.detach().clone()
        if model.has_null_label:
            fresh[-1] = given[-1]
        tensors = {**tensors, LABEL_TABLE: fresh}
        if say:
            print(f"{path} has {len(given)} labels, this model {len(table)}: the label table starts fresh", flush=True)
    return tensors


def out_of_memory(
    config: Config,
    geometry: Geometry,
    batches: BatchPlan,
    ranks: Ranks,
    device: torch.device,
    error: torch.OutOfMemoryError,
) -> UserError:
    """What ran out of a GPU's memory, and what would fit by the planner's arithmetic."""
    with torch.device("meta"):
        model = build_model(config, geometry)
    deepspeed = config.runtime.engine == "deepspeed"
    plan = plan_memory(
        model,
        micro_batch=batches.micro_batch,
        world=ranks.world,
        zero_stage=zero_stage(read_deepspeed_config(config.deepspeed)) if deepspeed else 0,
        averages=len(ema_decays(config.training)),
        value_bytes=2 if config.runtime.precision == "bf16" else 4,
        checkpointing=config.runtime.activation_checkpointing,
    )
    available = torch.cuda.get_device_properties(device).total_memory
    advice = advise(plan, available)
    if not deepspeed and "deepspeed=" in advice:
        advice += " runtime.engine=deepspeed"
    return UserError(
        f"out of GPU memory with training.batch_size={batches.micro_batch}: {str(error).split('. ')[0]}",
        "",
        f"{advice} (global_batch_size stays: accumulation makes up for it)",
    )
