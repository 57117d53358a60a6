"""Guidance on the reference's own models (golden README, section 1)."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rae_fast.dit.registry import build_dit
from rae_fast.transport.guidance import guided_velocity, scale_outside_pairs

GATE = 1e-5


def load_models(arrays: np.lib.npyio.NpzFile, meta: dict) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The model and, where the file has one, its guide."""
    models = []
    for prefix, key in (("sd/", "config"), ("sd_guid/", "guidance_config")):
        state = {n.removeprefix(prefix): torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(prefix)}
        model = build_dit(meta["kind"], meta[key]).eval() if state else None
        if model is not None:
            model.load_state_dict(state)
        models.append(model)
    return models[0], models[1]


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error <= GATE, f"{what}: rel {error:.2e} > {GATE:.0e}"


def stage2_files(golden_dir: Path, family: str) -> list[Path]:
    return sorted((golden_dir / "stage2").glob(f"{family}_*.npz"))


@torch.no_grad()
def test_ditdh_guidance_is_the_reference_s(golden_dir: Path) -> None:
    """CFG uses and returns one half of the batch there; ours has no second half."""
    compared = 0
    for file in stage2_files(golden_dir, "ddt"):
        arrays = np.load(file)
        meta = json.loads(str(arrays["meta"]))
        keys = [m for k in arrays.files if (m := re.fullmatch(r"out/(cfg|ag)_s([\d.]+)_i([\d.]+)_([\d.]+)", k))]
        if not keys:
            continue
        model, guide = load_models(arrays, meta)
        x, t, y = (torch.from_numpy(arrays[f"in/cfg_{n}"]) for n in ("x", "t", "y"))
        for match in keys:
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
            theirs = torch.from_numpy(arrays[match[0]])
            assert_close(velocity(x[:rows], t[:rows]), theirs[:rows], f"{file.stem} {match[0]}")
            if match[1] == "cfg":
                assert torch.equal(theirs[:rows], theirs[rows:])
            compared += 1
    assert compared


@torch.no_grad()
def test_lightning_dit_guidance_is_the_reference_s(golden_dir: Path) -> None:
    """Its intervals switch guidance off, by the time of the batch's first sample."""
    compared = 0
    pattern = r"out/(cfg|ag)_s([\d.]+)_(?:nointerval|i\[((?:\([\d.,]+\),?)+)\](?:_interval_cfg([\d.]+))?)"
    for file in stage2_files(golden_dir, "ldit"):
        arrays = np.load(file)
        meta = json.loads(str(arrays["meta"]))
        keys = [match for key in arrays.files if (match := re.fullmatch(pattern, key))]
        if not keys:
            continue
        model, guide = load_models(arrays, meta)
        x, t, y = (torch.from_numpy(arrays[f"in/cfg_{n}"]) for n in ("x", "t", "y"))
        rows = len(x) // 2
        for match in keys:
            pairs = [tuple(map(float, p.split(","))) for p in re.findall(r"\(([\d.,]+)\)", match[3] or "")]
            rule = partial(
                scale_outside_pairs, scale=float(match[2]), pairs=pairs, interval_scale=float(match[4] or 1.0)
            )
            velocity = guided_velocity(
                model,
                y=y[:rows],
                null_label=model.num_classes,
                method="cfg" if match[1] == "cfg" else "autoguidance",
                guide=guide,
                scale_at=rule,
            )
            theirs = torch.from_numpy(arrays[match[0]])
            assert_close(velocity(x[:rows], t[:rows]), theirs[:rows], f"{file.stem} {match[0]}")
            compared += 1
    assert compared
