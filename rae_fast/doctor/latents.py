"""Whether store, statistics, encoder and decoder belong together.

Shapes: B latents, C, H, W of a latent, S side of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Config, Stage1
from rae_fast.config_file import load_config
from rae_fast.doctor.evidence import Evidence
from rae_fast.doctor.findings import OK, SUSPECT, UNKNOWN, WRONG, Finding
from rae_fast.errors import UserError
from rae_fast.evaluation.reconstruction import psnr
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.plan import NONE, check_encoder
from rae_fast.latents.preview import source_crops, spread_rows
from rae_fast.latents.store import LatentStore, open_store
from rae_fast.training.run_folder import plain
from rae_fast.weights import read_statistics

STATISTICS_IMAGES, PAIRS = 256, 8
UNIT_STD = (0.75, 1.33)
LARGEST_MEAN = 0.3
STATISTICS_TOLERANCE = 1e-3
ENCODING_TOLERANCE = 0.1
LEAST_GAIN_DB = 1.0


def check_latents(evidence: Evidence) -> list[Finding]:
    """The store against the run, its values, the statistics, the encoder, and a few reconstructions."""
    store = evidence.store
    if store is None:
        return []
    findings = [_same_store(evidence, store), _values(store), _statistics(evidence.sampling, store)]
    crops = _crops(store)
    findings.append(_encoder(evidence.sampling, store, crops))
    findings.append(_decoder(evidence, store, crops))
    return findings


def _same_store(evidence: Evidence, store: LatentStore) -> Finding:
    """The store is the one that the run was begun with."""
    identity = evidence.manifest.get("identity", {})
    now = {
        "encoder": store.attrs["encoder"].get("weights_sha256"),
        "normalization": plain(store.attrs["normalization"]),
    }
    for name, value in now.items():
        if name in identity and identity[name] != value:
            found = f"{store.url} now has {name} {value}; the run was trained with {identity[name]}"
            return Finding("store", WRONG, found, "put back the store of the training, or train anew")
    return Finding("store", OK, f"{store.url}, {int(store.valid.sum()):,} images, as when the run began")


def _values(store: LatentStore) -> Finding:
    """Stored latents are about normalized, as noise and path take for granted."""
    z_BCHW = store.read(spread_rows(store, STATISTICS_IMAGES), store.views[0])
    std = float(z_BCHW.std())
    channel_means = float(z_BCHW.mean((0, 2, 3)).square().mean().sqrt())
    shown = f"standard deviation {std:.3g}, channel means {channel_means:.2g}"
    source = store.attrs["normalization"]["source"]
    if not bool(torch.isfinite(z_BCHW).all()):
        return Finding("latents", WRONG, "not all finite", "run tools/inspect_cache.py verify")
    if not UNIT_STD[0] < std < UNIT_STD[1] or channel_means > LARGEST_MEAN:
        found = f"not normalized: {shown} (statistics: {source}), where 1 and 0 are taken for granted"
        return Finding("latents", WRONG, found, "build the store with cache.statistics=compute, and train anew")
    if source == NONE:
        return Finding("latents", SUSPECT, f"{shown}, but the store is not normalized", "use cache.statistics=compute")
    return Finding("latents", OK, shown)


def _statistics(sampling: Config, store: LatentStore) -> Finding:
    """The config's statistics file, by which samples are decoded where the store is not at hand, is the store's."""
    path = sampling.stage_1.params.normalization_stat_path
    if path is None:
        found = "no stage_1.params.normalization_stat_path: samples are decoded right only where the store is at hand"
        return Finding("statistics", OK, found)
    try:
        mean, var = read_statistics(path)
    except UserError as error:
        return Finding("statistics", WRONG, error.found, f"take the store's: tools/convert.py, or {store.url}")
    for name, ours, theirs, default in (("mean", mean, store.mean, 0.0), ("variance", var, store.var, 1.0)):
        given = torch.tensor(default) if ours is None else ours.float()
        try:
            off = float((given - theirs).norm() / theirs.norm().clamp(min=1e-12))
        except RuntimeError:
            return Finding("statistics", WRONG, f"{path}: {name} {list(given.shape)}, latents {list(theirs.shape)}")
        if off > STATISTICS_TOLERANCE:
            found = f"{path}: {name} differs from the store's by {off:.1%}"
            return Finding(
                "statistics", WRONG, found, "set stage_1.params.normalization_stat_path=null, or its own file"
            )
    return Finding("statistics", OK, f"{path} is the store's")


def _crops(store: LatentStore) -> Tensor | None:
    """Images of a few rows, uint8 [B, 3, S, S], from the store or its source; None where both are gone."""
    rows = spread_rows(store, PAIRS)
    if store.attrs["pixels"]:
        return store.read_pixels(rows)
    try:
        return torch.from_numpy(source_crops(store, rows)).permute(0, 3, 1, 2)
    except UserError:
        return None


def _encoder(sampling: Config, store: LatentStore, crops: Tensor | None) -> Finding:
    """The config's encoder made the store: by the hash of its weights, and by a few latents made again."""
    try:
        encoder = LatentEncoder(sampling.stage_1.params, store.attrs["precision"], torch.device("cpu"))
    except UserError as error:
        return Finding("encoder", UNKNOWN, error.found, "decoding needs none")
    try:
        check_encoder(store, encoder)
    except UserError as error:
        return Finding("encoder", WRONG, f"{error.found}, the config's is {error.expected}", error.mend)
    if crops is None:
        return Finding("encoder", OK, "its weights are those that made the store (no image to try it on)")
    fresh = encoder(crops)
    stored = store.denormalize(store.read(spread_rows(store, PAIRS), store.views[0]))
    if store.views[0] == "hflip":
        fresh = encoder(crops, flip=True)
    off = float((fresh - stored).norm() / stored.norm())
    shown = f"encodes {len(crops)} stored images {off:.2%} off their latents"
    if off > ENCODING_TOLERANCE:
        return Finding("encoder", WRONG, shown, "run tools/inspect_cache.py compare, and verify")
    return Finding("encoder", OK, shown)


def _decoder(evidence: Evidence, store: LatentStore, crops: Tensor | None) -> Finding:
    """The decoder was trained on this encoder's latents, and restores a few of them better than a flat colour does."""
    section = _with_decoder(evidence)
    weights = section.ckpt or section.params.pretrained_decoder_path
    if weights is None:
        return Finding("decoder", UNKNOWN, "no stage_1.params.pretrained_decoder_path", "name one to look at pixels")
    foreign = _trained_on_another(Path(weights), store)
    if foreign:
        return Finding("decoder", WRONG, foreign, "train a decoder for this encoder, or name the right one")
    try:
        rae = build_rae(section, need_encoder=False).eval()
    except UserError as error:
        return Finding("decoder", WRONG, error.found, error.mend)
    if crops is None:
        return Finding("decoder", UNKNOWN, "there is no image to compare a reconstruction with")
    z_BCHW = store.denormalize(store.read(spread_rows(store, PAIRS), store.views[0]))
    original = crops.float() / 255
    if store.views[0] == "hflip":
        original = original.flip(-1)
    with torch.no_grad():
        restored = rae.decode_tokens(z_BCHW.flatten(2).transpose(1, 2)).clamp(0, 1)
    if restored.shape != original.shape:
        found = f"makes images of {restored.shape[-1]} pixels, the store's are {original.shape[-1]}"
        return Finding("decoder", WRONG, found, "check stage_1.params.decoder_patch_size")
    flat = original.mean((2, 3), keepdim=True).expand_as(original).contiguous()
    reached, floor = (float(psnr(images, original).mean()) for images in (restored, flat))
    shown = f"restores {len(crops)} stored images at {reached:.1f} dB, a flat colour at {floor:.1f} dB"
    if reached < floor:
        return Finding("decoder", WRONG, shown, "it is untrained, or of another encoder or final norm")
    if reached < floor + LEAST_GAIN_DB:
        return Finding("decoder", SUSPECT, shown, "train it longer")
    return Finding("decoder", OK, shown)


def _with_decoder(evidence: Evidence) -> Stage1:
    """The sampling's stage 1; of a decoder run with what it exported. Statistics are the store's."""
    params = replace(evidence.sampling.stage_1.params, normalization_stat_path=None)
    export = evidence.folder / "export" / "model.pt"
    if evidence.is_decoder and export.is_file():
        return replace(
            evidence.sampling.stage_1, ckpt=None, params=replace(params, pretrained_decoder_path=str(export))
        )
    return replace(evidence.sampling.stage_1, params=params)


def _trained_on_another(weights: Path, store: LatentStore) -> str:
    """How the store of the decoder's run differs from this one, if that run can be seen; empty if it does not."""
    config_file = weights.parent.parent / "config.yaml"
    if not config_file.is_file():
        return ""
    try:
        config = load_config(config_file)
        theirs: Mapping[str, Any] = open_store(config.cache.path).attrs["encoder"] if config.cache.path else {}
    except UserError:
        return ""
    for name in ("weights_sha256", "layers", "final_norm", "input_size"):
        if theirs and theirs.get(name) != store.attrs["encoder"].get(name):
            return f"{weights} was trained on latents of another encoder: {name} {theirs.get(name)}"
    return ""
