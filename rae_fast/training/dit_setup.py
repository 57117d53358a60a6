"""What a DiT's training starts from: store, model, pretrained weights, and the checks between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rae_fast.config import Config
from rae_fast.dit.registry import build_dit
from rae_fast.dit.trunk import DiffusionTransformer
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, dit_params
from rae_fast.interop.official import likely_cause, read_dit_weights
from rae_fast.latents.store import LatentStore, check_compatible, open_store
from rae_fast.training.batching import BatchPlan
from rae_fast.weights import load_strictly

LABEL_TABLE = "y_embedder.embedding_table.weight"


def open_training_store(config: Config, geometry: Geometry) -> tuple[LatentStore, Geometry]:
    """The store, checked against the config; and the geometry, with the store's classes if the config does not say.

    Raises:
        UserError: no store, or one of another latent size, encoder input or number of classes.
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
    classes = geometry.num_classes
    if classes is None:
        classes = max(len(store.class_names), 1)
        geometry = replace(geometry, num_classes=classes, null_label=classes)
    largest = int(store.labels.max(initial=0))
    if largest >= classes:
        raise UserError(
            f"{store.url} has labels up to {largest}, but the config has {classes} classes",
            f"misc.num_classes {len(store.class_names)}",
            "set misc.num_classes",
        )
    return store, geometry


def build_model(config: Config, geometry: Geometry) -> DiffusionTransformer:
    """The model at its seeded initialization, equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.global_seed)
        model = build_dit(config.stage_2.target, dit_params(config, geometry))
    model.activation_checkpointing = config.runtime.activation_checkpointing
    return model


def load_pretrained(model: DiffusionTransformer, path: str, *, say: bool = True) -> None:
    """Start from a released or exported checkpoint; for other classes, all but the label table.

    A label table of another size starts fresh, except for its null row, which the checkpoint gives.

    Raises:
        UserError: the file cannot be read, or anything but the label table does not fit.
    """
    tensors = read_dit_weights(path)
    table = model.y_embedder.embedding_table.weight
    given = tensors.get(LABEL_TABLE)
    if given is not None and given.shape != table.shape and given.shape[1:] == table.shape[1:]:
        fresh = table.detach().clone()
        if model.has_null_label:
            fresh[-1] = given[-1]
        tensors = {**tensors, LABEL_TABLE: fresh}
        if say:
            print(f"{path} has {len(given)} labels, this model {len(table)}: the label table starts fresh", flush=True)
    load_strictly(model, tensors, path, likely_cause(model.state_dict(), tensors))


def identity(config: Config, store: LatentStore, batches: BatchPlan) -> dict[str, Any]:
    """What decides which sample is seen when; a run folder keeps to it."""
    loader = config.loader
    return {
        "dataset": store.attrs["dataset"]["segments"],
        "encoder": store.attrs["encoder"].get("weights_sha256"),
        "normalization": store.attrs["normalization"],
        "global_batch_size": batches.global_batch,
        "global_seed": config.training.global_seed,
        "shuffle": [loader.shuffle, loader.block_size, loader.flip, loader.balanced, loader.classes],
    }


def facts_about(store: LatentStore) -> dict[str, Any]:
    """What the run's manifest says of the store."""
    keys = ("num_images", "latent_shape", "views", "codec", "encoder", "normalization", "dataset", "codec_error")
    return {"url": store.url, **{key: store.attrs.get(key) for key in keys}}


def training_flops(config: Config, geometry: Geometry) -> float:
    """Model FLOPs of training on one sample: three times the forward pass, counted on tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The CPU's fused attention is unknown to the counter; as plain products it is counted in full.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        shadow = build_dit(config.stage_2.target, dit_params(config, geometry)).eval()
        x = torch.empty(1, *geometry.latent_shape)
        y = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            shadow(x, torch.empty(1), y)
    return 3.0 * counter.get_total_flops()
