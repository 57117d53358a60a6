"""Features of sets of images, by Inception, by a configured encoder, or by any torch module.

Shapes: B images of a piece, C, H, W of a latent, D values of a feature.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.extractor import FEATURES, LOGITS, SPATIAL, Extractor
from rae_fast.evaluation.feature_cache import Figures
from rae_fast.evaluation.image_sets import PIECE, ImageSet, store_fingerprint
from rae_fast.evaluation.inception import Inception
from rae_fast.latents.encode import LatentEncoder
from rae_fast.latents.store import LatentStore
from rae_fast.provenance import sha256_file, sha256_tensors

POOLINGS = ("mean", "cls")


class EncoderFeatures(Extractor):
    """A configured frozen encoder: the mean of its patch tokens, or its class token.

    The mean is of the latents before normalization, so a store's latents give the same features without an image.

    Args:
        config: stage 1 names the encoder.
        precision: fp32, tf32, bf16 or fp16.
        device: where it runs.
        pooling: mean or cls.

    Raises:
        UserError: the encoder cannot be had, or has no class token.
    """

    name = "encoder"

    def __init__(self, config: Config, precision: str, device: torch.device, pooling: str = "mean") -> None:
        self.encoder = LatentEncoder(config.stage_1.params, precision, device)
        self._pooling = pooling
        if pooling == "cls" and not self.encoder.encoder.prefix_tokens:
            raise UserError("--token cls, but the encoder has no class token", "--token mean")
        self.identity = {**self.encoder.identity(), "token": pooling, "precision": precision}
        del self.identity["name"]  # where the files lie does not matter, the hash of the weights does

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        if self._pooling == "cls":
            return {FEATURES: self._class_token(images_B3HW)}
        return {FEATURES: mean_token(self.encoder(images_B3HW))}

    def _class_token(self, images_B3HW: Tensor) -> Tensor:
        """The first token after the final norm, float32 [B, C], averaged over the encoder's chosen layers."""
        encoder = self.encoder.encoder
        pixels = encoder.prepare(images_B3HW.to(self.encoder.device).float() / 255).to(encoder.options.dtype)
        with self.encoder.autocast():
            tokens = encoder.block_tokens(pixels)
        return torch.stack([encoder.normalize(x_BND[:, 0]) for x_BND in tokens]).mean(0)


class ModuleFeatures(Extractor):
    """Any torch module, or function, of images in [0, 1], float32 [B, 3, H, W].

    It returns features [B, ...], or a mapping with `features` and, if it likes, `spatial` and `logits`.

    Args:
        spec: `module:attribute`; the attribute is a module, a class of one without arguments, a function without
            arguments that makes one, or a function of images.
        device: where a module is moved to.

    Raises:
        UserError: there is no such module or attribute.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        found = _import(spec)
        if not isinstance(found, nn.Module) and not _required_parameters(found):
            found = found()
        self.name, self._device, self._function = spec, device, found
        self.identity = {"module": spec, "source_sha256": _source_sha256(spec)}
        if isinstance(found, nn.Module):
            self._function = found.to(device).eval()
            self.identity["weights_sha256"] = sha256_tensors(found.state_dict())

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        found = self._function(images_B3HW.to(self._device).float() / 255)
        named = found if isinstance(found, dict) else {FEATURES: found}
        unknown = [name for name in named if name not in (FEATURES, SPATIAL, LOGITS)]
        if FEATURES not in named or unknown or any(len(value) != len(images_B3HW) for value in named.values()):
            shapes = {name: list(value.shape) for name, value in named.items()}
            raise UserError(f"{self.name} gave {shapes} for {len(images_B3HW)} images", "a feature for each image")
        return {name: value.float().flatten(1) for name, value in named.items()}


def mean_token(z_BCHW: Tensor) -> Tensor:
    """Mean over tokens, float32 [B, C], of latents before normalization: what the encoder says of a whole image."""
    return z_BCHW.float().flatten(2).mean(dim=2)


def build_extractor(
    name: str,
    config: Config | None,
    device: torch.device,
    *,
    inception_weights: str | Path | None = None,
    pooling: str = "mean",
    precision: str = "fp32",
) -> Extractor:
    """`inception`, `encoder` (of the config), or `module:attribute`.

    Raises:
        UserError: no such extractor, or what it needs is missing.
    """
    if name == Inception.name:
        return Inception(inception_weights, device)
    if name == EncoderFeatures.name:
        if config is None:
            raise UserError("features of the encoder, but no encoder is named", "--config FILE, or a store to compare")
        return EncoderFeatures(config, precision, device, pooling)
    if ":" in name:
        return ModuleFeatures(name, device)
    raise UserError(f"--features {name!r}", "inception, encoder, or my_module:function")


def image_features(images: ImageSet, extractor: Extractor) -> Figures:
    """The extractor's features of a set of images."""

    def compute(start: int, stop: int) -> tuple[bytes, dict[str, np.ndarray]]:
        digest, parts = hashlib.sha256(), []
        for piece_nHW3 in images.pieces(start, stop):
            digest.update(piece_nHW3.tobytes())
            parts.append(_of_piece(extractor, piece_nHW3))
        return digest.digest(), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    key = {"images": images.fingerprint, "extractor": {extractor.name: extractor.identity}}
    return Figures(key, images.count, compute, f"{extractor.name}: {images.source}")


def stored_features(store: LatentStore, extractor: EncoderFeatures) -> Figures:
    """Mean tokens from a store's latents.

    Raises:
        UserError: another encoder made the store.
    """
    # Here, as a machine that only measures need not have what configs are read with.
    from rae_fast.latents.plan import check_encoder

    check_encoder(store, extractor.encoder)
    rows = np.flatnonzero(store.valid)
    view = "original" if "original" in store.views else store.views[0]

    def compute(start: int, stop: int) -> tuple[bytes, dict[str, np.ndarray]]:
        z_nCHW = store.read(rows[start:stop], view)
        content = hashlib.sha256(z_nCHW.numpy().tobytes()).digest()
        return content, {FEATURES: mean_token(store.denormalize(z_nCHW)).numpy()}

    key = {"latents": store_fingerprint(store), "view": view, "token": "mean"}
    return Figures(key, len(rows), compute, f"stored latents: {store.url}")


def _of_piece(extractor: Extractor, piece_nHW3: np.ndarray) -> dict[str, np.ndarray]:
    """Features of a piece, computed on exactly PIECE rows."""
    padding = [(0, PIECE - len(piece_nHW3)), (0, 0), (0, 0), (0, 0)]
    images_B3HW = torch.from_numpy(np.pad(piece_nHW3, padding, mode="edge")).permute(0, 3, 1, 2).contiguous()
    found = extractor(images_B3HW)
    return {name: value[: len(piece_nHW3)].float().cpu().numpy() for name, value in found.items()}


def _import(spec: str) -> Callable[..., Any]:
    name, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a module beside the command, as with `python -m`
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--features {spec}: {error}", "importable_module:attribute", "run it where the module lies"
        ) from error
    if not callable(found):
        raise UserError(f"--features {spec} is a {type(found).__name__}", "a torch module or a function")
    return found


def _required_parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in positional]


def _source_sha256(spec: str) -> str:
    file = sys.modules[spec.partition(":")[0]].__file__
    return sha256_file(file) if file else ""
