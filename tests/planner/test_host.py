"""This machine's figures are taken at a precision that it computes fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rae_fast.config_file import load_config
from rae_fast.geometry import resolve_geometry
from rae_fast.planner import machine
from rae_fast.planner.host import _fast_precision, this_machine

CPU = torch.device("cpu")


def test_bf16_is_measured_in_fp32_where_a_cpu_only_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a bf16 recipe took minutes each on such a CPU, and the plan an hour."""
    config = load_config(None, ["runtime.precision=bf16", "cache.precision=bf16"])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    measured, note = _fast_precision(config, CPU)
    assert (measured.runtime.precision, measured.cache.precision) == ("fp32", "fp32")
    assert "fp32" in note
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert _fast_precision(config, CPU) == (config, "")


def test_fp32_and_gpus_are_measured_as_configured() -> None:
    config = load_config(None, ["runtime.precision=fp32", "cache.precision=fp32"])
    assert _fast_precision(config, CPU) == (config, "")
    config = load_config(None, ["runtime.precision=bf16"])
    assert _fast_precision(config, torch.device("cuda")) == (config, "")


def test_no_bound_lies_below_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Products measured while others used the machine gave "at most 0.2, expected 0.4 images/s"."""
    config = load_config(None, ["misc.latent_size=[8,16,16]", "runtime.device=cpu", f"cache.path={tmp_path}"])
    monkeypatch.setattr(machine, "measure_products", lambda device: 1.0)
    monkeypatch.setattr(machine, "measure_step", lambda *args: machine.StepTime(image_s=0.5, update_s=0.0))
    monkeypatch.setattr(machine, "measure_encoder", lambda *args: None)
    monkeypatch.setattr(machine, "measure_disk", lambda *args: 1e9)
    found = this_machine(config, resolve_geometry(config), count=1, images_a_step=8)
    assert found.expected_images_s == 2.0
    assert found.floor_images_s == 2.0
