"""Choosing configurations: what is measured, what is written down, and that all ranks do the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rae_kernels import launches, tuner, tuning, warm
from rae_kernels.launches import HEAD, TRUNK_XL, Maker

from rae_fast.dit import build_dit
from rae_fast.dit.fused import TORCH, TRITON, prepare_kernels, stacks, use_kernels

MAKE = Maker("cuda", 256, 256)


class Machine:
    """A GPU that is not there: counts what is compiled and timed; the last candidate is always the fastest."""

    def __init__(self) -> None:
        self.jobs: list[warm.Job] = []
        self.timed: list[str] = []

    def compile_ahead(self, jobs: list[warm.Job], capability: int) -> None:
        assert capability == 90
        self.jobs += jobs

    def config_us(self, work: tuner.Work, config: dict[str, Any]) -> float:
        self.timed.append(work.operation)
        return 1000.0 - tuner.candidates(work.operation, work.make.tokens).index(config)

    def attention_us(self, stack: launches.Stack, make: Maker) -> dict[str, float]:
        self.timed.append("attention")
        return {"triton": 100.0, "sdpa": 100.0 + stack.width - 1500}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    for name in ("compile_ahead", "config_us", "attention_us"):
        monkeypatch.setattr(tuner, name, getattr(made, name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tuning, "_machine", lambda _: ("NVIDIA H200", "3.6"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.table.cache_clear()
    yield made
    tuning.table.cache_clear()


def test_an_unknown_gpu_is_measured_once_and_remembered_by_the_next_process(machine: Machine) -> None:
    tuner.ensure_tuned([TRUNK_XL, HEAD], MAKE)
    assert set(machine.timed) == {
        "attention", "attention.forward", "attention.backward.queries", "attention.backward.keys",
        "norm_modulate.forward", "norm_modulate.backward", "swiglu.forward", "swiglu.backward",
    }  # fmt: skip
    assert len(machine.jobs) == len(machine.timed) - 2, (
        "all but the choice of attention, once a width, is compiled ahead"
    )
    machine.timed.clear()
    tuning.table.cache_clear()
    tuner.ensure_tuned([TRUNK_XL, HEAD], MAKE)
    assert machine.timed == []
    found = tuning.read(tuning.cache_path())
    key = ("NVIDIA H200", "3.6", "attention", "tokens=256 head=72", "bfloat16")
    assert found[key] == {"implementation": "sdpa"}
    assert found[(*key[:3], "tokens=256 head=128", "bfloat16")] == {"implementation": "triton"}


def test_a_measurement_that_was_killed_goes_on_where_it_was(machine: Machine) -> None:
    findings = tuner.tune([TRUNK_XL], MAKE, tuning.cache_path(), lambda _: None)
    done = {next(findings).operation for _ in range(3)}
    findings.close()
    machine.timed.clear()
    tuning.table.cache_clear()
    tuner.ensure_tuned([TRUNK_XL], MAKE)
    assert machine.timed and done.isdisjoint(machine.timed)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_measures_and_all_ranks_take_its_table(
    machine: Machine, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {("NVIDIA H200", "3.6", "attention.forward", "tokens=256 head=72", "bfloat16"): {"queries": 7}}

    def broadcast(box: list, src: int) -> None:
        assert src == 0 and (box[0] is None) == (rank != 0)
        box[0] = box[0] or theirs

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    tuner.ensure_tuned([TRUNK_XL], MAKE)
    assert bool(machine.timed) == (rank == 0)
    if rank:
        assert tuning.table() == theirs
    else:
        assert tuning.table() == tuning.read(tuning.cache_path()) != {}, "rank 0 keeps what it measured"


def test_what_is_tuned_is_what_the_operations_look_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key spelt in two ways would leave every kernel at its default for ever."""
    from rae_kernels import attention, norm_modulate, swiglu

    tuner.ensure_tuned([TRUNK_XL], MAKE)
    seen = []
    monkeypatch.setattr(tuning, "lookup", lambda op, shape, dtype, *_: seen.append((op, tuning.describe(shape), dtype)))
    meta = MAKE._replace(device="meta")
    terms = launches.norm_terms(TRUNK_XL, meta)
    for direction in ("forward", "backward"):
        norm_modulate._config(direction, terms.x, terms.gate, terms.scale)
        swiglu._config(direction, meta.rows(2 * TRUNK_XL.hidden))
    for direction in ("forward", "backward.queries", "backward.keys"):
        attention._config(direction, launches.attention_given(TRUNK_XL, meta).qkv)
    known = {(op, shape, dtype) for _, _, op, shape, dtype in tuning.table()}
    assert {(op, shape, tuning.name(dtype)) for op, shape, dtype in seen} == known - {
        ("attention", "tokens=256 head=72", "bfloat16")
    }


def test_a_models_widths_are_those_that_the_tuner_knows() -> None:
    with torch.device("meta"):
        model = build_dit("DiTDH-XL", {"input_size": 16, "depth": [1, 1]})
    use_kernels(model, TRITON)
    assert stacks(model, torch.bfloat16) == [TRUNK_XL, HEAD]
    use_kernels(model, TORCH)
    assert stacks(model, torch.bfloat16) == []


def test_nothing_is_measured_for_cpus_plain_pytorch_or_float32(machine: Machine) -> None:
    with torch.device("meta"):
        model = build_dit("DiTDH-S", {"input_size": 16, "depth": [1, 1]})
    prepare_kernels(model, 8, torch.bfloat16, torch.device("cuda"))
    use_kernels(model, TRITON)
    prepare_kernels(model, 8, torch.bfloat16, torch.device("cpu"))
    prepare_kernels(model, 8, torch.float32, torch.device("cuda"))
    assert machine.timed == []
    prepare_kernels(model, 8, torch.bfloat16, torch.device("cuda"))
    assert machine.timed


def test_every_operation_has_candidates_and_a_launch() -> None:
    meta = MAKE._replace(device="meta")
    for work in tuner.works(TRUNK_XL, meta):
        for config in tuner.candidates(work.operation, meta.tokens):
            assert launches.launch_of(work.operation, TRUNK_XL, meta, config).grid


def test_processes_compile_into_the_cache_where_a_start_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from rae_kernels import resources

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    small = launches.Stack(64, 2, 64, False, torch.float32)
    jobs = [warm.Job("swiglu.forward", small, Maker("meta", 2, 16), {"rows": 1, "columns": 64, "warps": 1})]
    assert warm.compile_ahead(jobs, 90) == 1
    compiled = set(tmp_path.rglob("*.cubin"))
    assert len(compiled) == 1
    resources.warm(launches.launch_of(jobs[0].operation, small, jobs[0].make, jobs[0].config))
    assert set(tmp_path.rglob("*.cubin")) == compiled
