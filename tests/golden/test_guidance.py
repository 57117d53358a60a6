"""Guidance on the reference's own models (golden README, section 1)."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from rae_fast.dit.registry import build_dit
from rae_fast.transport.guidance import guided_velocity, scale_outside_pairs

if TYPE_CHECKING:
    from conftest import Golden

GATE = 1e-5


def load_models(golden: Golden) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The model and, where the file has one, its guide."""
    models = []
    for prefix, key in (("sd/", "config"), ("sd_guid/", "guidance_config")):
        state = golden.tensors(prefix)
        model = build_dit(golden.meta["kind"], golden.meta[key]).eval() if state else None
        if model is not None:
            model.load_state_dict(state)
        models.append(model)
    return models[0], models[1]


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error <= GATE, f"{what}: rel {error:.2e} > {GATE:.0e}"


def recorded(golden: Golden, pattern: str) -> list[re.Match[str]]:
    found = [match for name in golden.names("out/") if (match := re.fullmatch(pattern, name))]
    if not found:
        pytest.skip("no guided figures for this model")
    return found


@pytest.mark.golden("stage2/ddt_*.npz")
@torch.no_grad()
def test_ditdh_guidance_is_the_reference_s(golden: Golden) -> None:
    """CFG uses and returns one half of the batch there; ours has no second half."""
    settings = recorded(golden, r"out/(cfg|ag)_s([\d.]+)_i([\d.]+)_([\d.]+)")
    model, guide = load_models(golden)
    x, t, y = (golden[f"in/cfg_{name}"] for name in ("x", "t", "y"))
    for match in settings:
        rows = len(x) // 2 if match[1] == "cfg" else len(x)
        velocity = guided_velocity(
            model,
            y=y[:rows],
            null_label=model.num_classes,
            scale=float(match[2]),
            t_min=float(match[3]),
            t_max=float(match[4]),
            method="cfg" if match[1] == "cfg" else "autoguidance",
            guide=guide,
        )
        theirs = golden[match[0]]
        assert_close(velocity(x[:rows], t[:rows]), theirs[:rows], match[0])
        if match[1] == "cfg":
            assert torch.equal(theirs[:rows], theirs[rows:])


@pytest.mark.golden("stage2/ldit_*.npz")
@torch.no_grad()
def test_lightning_dit_guidance_is_the_reference_s(golden: Golden) -> None:
    """Its intervals switch guidance off, by the time of the batch's first sample."""
    pattern = r"out/(cfg|ag)_s([\d.]+)_(?:nointerval|i\[((?:\([\d.,]+\),?)+)\](?:_interval_cfg([\d.]+))?)"
    settings = recorded(golden, pattern)
    model, guide = load_models(golden)
    x, t, y = (golden[f"in/cfg_{name}"] for name in ("x", "t", "y"))
    rows = len(x) // 2
    for match in settings:
        pairs = [tuple(map(float, pair.split(","))) for pair in re.findall(r"\(([\d.,]+)\)", match[3] or "")]
        rule = partial(scale_outside_pairs, scale=float(match[2]), pairs=pairs, interval_scale=float(match[4] or 1.0))
        velocity = guided_velocity(
            model,
            y=y[:rows],
            null_label=model.num_classes,
            method="cfg" if match[1] == "cfg" else "autoguidance",
            guide=guide,
            scale_at=rule,
        )
        assert_close(velocity(x[:rows], t[:rows]), golden[match[0]][:rows], match[0])
