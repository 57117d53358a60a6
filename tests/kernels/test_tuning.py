"""The table of measured configurations: who reads it gets what was measured there, or the default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rae_kernels import tuning

GPU = torch.device("cuda", 0)
SHAPE = {"tokens": 256, "head": 72}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU by name, with an empty table of its own; gives the path of the user's table."""
    monkeypatch.setattr(tuning, "_machine", lambda _: ("NVIDIA H200", "3.6"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.table.cache_clear()
    yield tuning.cache_path()
    tuning.table.cache_clear()


def look(dtype: torch.dtype = torch.bfloat16, device: torch.device = GPU) -> dict:
    return tuning.lookup("attention.forward", SHAPE, dtype, device, {"queries": 1})


def test_what_was_recorded_is_found_by_this_process_and_the_next(machine: Path) -> None:
    assert look() == {"queries": 1}
    tuning.record("attention.forward", SHAPE, torch.bfloat16, GPU, {"queries": 64}, machine)
    assert look() == {"queries": 64}
    tuning.table.cache_clear()
    assert look() == {"queries": 64}
    assert look(torch.float16) == {"queries": 1} and look(device=torch.device("cpu")) == {"queries": 1}


def test_another_gpu_or_triton_finds_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.record("attention.forward", SHAPE, torch.bfloat16, GPU, {"queries": 64}, machine)
    monkeypatch.setattr(tuning, "_machine", lambda _: ("NVIDIA H200", "3.8"))
    assert look() == {"queries": 1}


def test_a_table_of_another_format_is_named(machine: Path) -> None:
    machine.parent.mkdir(parents=True)
    machine.write_text(json.dumps({"format": 99, "entries": []}))
    with pytest.raises(ValueError, match=r"tuned\.json: format 1 expected"):
        look()


def test_the_committed_table_can_be_read() -> None:
    assert isinstance(tuning.read(tuning.COMMITTED), dict)


def test_the_fastest_candidate_wins_and_one_that_does_not_fit_is_left_out() -> None:
    from triton.runtime.errors import OutOfResources

    def seconds(config: dict) -> float:
        if config["queries"] == 256:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0 / config["queries"]

    best, times = tuning.fastest([{"queries": 64}, {"queries": 128}, {"queries": 256}], seconds)
    assert best == {"queries": 128} and len(times) == 2
    with pytest.raises(ValueError, match="no candidate runs"):
        tuning.fastest([{"queries": 256}], seconds)
