"""This machine's figures are taken at a precision that it computes fast."""

from __future__ import annotations

import pytest
import torch

from rae_fast.config_file import load_config
from rae_fast.planner.host import _fast_precision

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
