"""Diffusion transformers by name: the reference's `target` spellings, and sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rae_fast.dit.ditdh import DiTDH
from rae_fast.dit.lightning_dit import LightningDiT
from rae_fast.dit.trunk import DiffusionTransformer
from rae_fast.errors import UserError, nearest

# (width, depth, heads) of the trunk; the head of every DiTDH is 2048 wide, 2 blocks deep, with 16 heads.
TRUNKS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
HEAD = (2048, 2, 16)

TARGETS: dict[str, type[DiffusionTransformer]] = {
    "stage2.models.DDT.DiTwDDTHead": DiTDH,
    "stage2.models.lightningDiT.LightningDiT": LightningDiT,
    "DiTwDDTHead": DiTDH,
    "DiTDH": DiTDH,
    "LightningDiT": LightningDiT,
}


def size_presets() -> dict[str, tuple[type[DiffusionTransformer], dict[str, Any]]]:
    """Class and constructor arguments of every named size, such as `DiTDH-XL`."""
    presets: dict[str, tuple[type[DiffusionTransformer], dict[str, Any]]] = {}
    for size, trunk in TRUNKS.items():
        names = ("hidden_size", "depth", "num_heads")
        both = {name: [value, head] for name, value, head in zip(names, trunk, HEAD, strict=True)}
        presets[f"DiTDH-{size}"] = (DiTDH, both)
        presets[f"LightningDiT-{size}"] = (LightningDiT, dict(zip(names, trunk, strict=True)))
    return presets


def build_dit(target: str, params: Mapping[str, Any]) -> DiffusionTransformer:
    """A freshly initialized model.

    Args:
        target: one of the reference's names, a short name, or a size; `params` override a size's numbers.
        params: constructor arguments.

    Raises:
        UserError: unknown target or parameter, or numbers that do not fit together.
    """
    presets = size_presets()
    if target not in TARGETS and target not in presets:
        known = [*TARGETS, *presets]
        raise UserError(
            f"stage_2.target is {target!r}{nearest(target, known)}", f"one of {', '.join(known)}", "change the target"
        )
    model_class, numbers = presets.get(target) or (TARGETS[target], {})
    known = list(inspect.signature(model_class.__init__).parameters)[1:]
    for name in params:
        if name not in known:
            raise UserError(
                f"stage_2.params.{name} is not a parameter of {model_class.__name__}{nearest(name, known)}",
                f"some of {', '.join(known)}",
            )
    return model_class(**{**numbers, **params})
