"""Whether the weights can be those of a trained model: finite, moved, and the average beside what it averages.

Distances are relative: |a - b| / |b|, over all parameters together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rae_fast.doctor.evidence import Evidence
from rae_fast.doctor.findings import OK, SUSPECT, UNKNOWN, WRONG, Finding
from rae_fast.training.batching import ema_decays
from rae_fast.training.dit_setup import build_model

# An average that has covered less than this share of the way from the start to the online weights is not one.
STUCK = 0.01
LEFT_OVER = 0.1


def check_weights(evidence: Evidence) -> list[Finding]:
    """Finite values; the EMA against the online weights and the initial ones."""
    for name, weights in (("online", evidence.online), ("EMA", evidence.ema), ("sampled", evidence.sampled)):
        broken = [key for key, value in (weights or {}).items() if not bool(torch.isfinite(value).all())]
        if broken:
            found = f"{len(broken)} tensors of the {name} weights are not finite, first {broken[0]}"
            return [Finding("weights", WRONG, found, "go back to an earlier checkpoint")]
    findings = [Finding("weights", OK, f"all finite after {evidence.step:,} steps")]
    return [*findings, _average(evidence)]


def _average(evidence: Evidence) -> Finding:
    if evidence.ema is None:
        return Finding("EMA", SUSPECT, "no running average is kept", "set training.ema_decay=0.9995")
    moved = distance(evidence.ema, evidence.online)
    decay = str(ema_decays(evidence.trained.training)[0])
    if moved == 0 and evidence.step > 1 and _number(decay) > 0:
        return Finding("EMA", WRONG, "equal to the online weights, bit for bit", "the average is not one: train anew")
    initial = initial_weights(evidence)
    if initial is None:
        return Finding("EMA", UNKNOWN, f"differs from the online weights by {moved:.3g}; the start is unknown")
    way = distance(evidence.online, initial)
    covered = distance(evidence.ema, initial) / way if way else 1.0
    shown = f"has covered {covered:.1%} of the online weights' way"
    left = _number(decay) ** evidence.step if _number(decay) < 1 else 0.0
    if covered < STUCK and left < 0.9:
        found = f"{shown}: it is not updated (decay {decay}, {evidence.step:,} steps)"
        return Finding("EMA", WRONG, found, "sample the online weights, and train anew")
    if left > LEFT_OVER:
        found = f"{shown}: at decay {decay} the start still weighs {left:.0%} after {evidence.step:,} steps"
        state = WRONG if left > 0.5 else SUSPECT
        return Finding("EMA", state, found, "sample the online weights, train longer, or lower training.ema_decay")
    return Finding("EMA", OK, f"{shown}, {moved:.3g} from them")


def initial_weights(evidence: Evidence) -> Mapping[str, Tensor] | None:
    """The weights that the run began with, where they can be made again."""
    if evidence.is_decoder or evidence.trained.stage_2.ckpt is not None:
        return None
    return build_model(evidence.trained, evidence.geometry).state_dict()


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a - b| / |b| over the floating-point tensors that both hold."""
    names = [name for name in a if name in b and a[name].is_floating_point() and a[name].shape == b[name].shape]
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in names)
    return (difference / max(sum(float(b[name].double().square().sum()) for name in names), 1e-30)) ** 0.5


def _number(decay: str) -> float:
    """A constant decay; 0 for power profiles, which forget their start by themselves."""
    try:
        return float(decay)
    except ValueError:
        return 0.0
