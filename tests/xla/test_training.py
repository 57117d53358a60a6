from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rae_fast.config import Config, Optimizer, Runtime
from rae_fast.dit.registry import build_dit
from rae_fast.runtime import Ranks
from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.engine import Engine
from rae_fast.xla.device import compilations, fallbacks
from rae_fast.xla.engine import XlaEngine

ROOT = Path(__file__).resolve().parents[2]
PARAMS = {
    "input_size": 4,
    "in_channels": 16,
    "hidden_size": [32, 48],
    "depth": [1, 1],
    "num_heads": [2, 2],
    "num_classes": 3,
}
RunConfig = Callable[..., Config]


def model(seed: int = 0) -> torch.nn.Module:
    """A DiTDH with every parameter random, so that none of them hides behind a zero."""
    torch.manual_seed(seed)
    built = build_dit("DiTDH", PARAMS)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return built


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 16, 4, 4, generator=generator)
    return x, torch.rand(4, generator=generator), torch.tensor([0, 1, 2, 3]), torch.rand(4, generator=generator)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def losses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


def assert_same_log(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_gradients_equal_the_cpus(device: torch.device, checkpointing: bool) -> None:
    results = []
    for where in (torch.device("cpu"), device):
        dit = model().to(where)
        dit.activation_checkpointing = checkpointing
        x, t, y, u = (value.to(where) for value in batch(0))
        out = dit(x, t, y, labeldrop_u=u)
        out.square().mean().backward()
        results.append((out.detach().cpu(), {n: p.grad.cpu() for n, p in dit.named_parameters() if p.grad is not None}))
    (expected, expected_grads), (found, found_grads) = results
    assert distance(found, expected) <= 1e-5
    assert found_grads.keys() == expected_grads.keys()
    for name, gradient in found_grads.items():
        assert distance(gradient, expected_grads[name]) <= 1e-4, name


def engines(device: torch.device, **options: object) -> tuple[Engine, XlaEngine]:
    shared = {
        "optimizer": Optimizer(lr=1e-2, weight_decay=0.1, decay_norms_and_biases=False),
        "lr": lambda step: 1e-2 / (1 + step),
        "ranks": Ranks(),
        "clip_grad": 0.1,
        "ema_decays": [0.9, "power_0.1"],
        **options,
    }
    runtime = Runtime(engine="ddp", precision="fp32")
    return (
        Engine(model(), device=torch.device("cpu"), runtime=runtime, **shared),
        XlaEngine(model(), device=device, runtime=runtime, **shared),
    )


def train(engine: Engine, step: int, poison: bool = False) -> list[float]:
    for micro in range(engine.accumulation):
        x, t, y, u = (value.to(engine.device) for value in batch(10 * step + micro))
        loss = engine(x, t, y, labeldrop_u=u).square().mean()
        engine.backward(loss * float("nan") if poison else loss)
        engine.observe(loss.detach().reshape(1))
        engine.step()
    return engine.record.tolist()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_equal_the_cpu_engines_and_a_bad_one_changes_nothing(device: torch.device, accumulation: int) -> None:
    torch.set_num_threads(1)
    here, there = engines(device, accumulation=accumulation)
    for step in range(4):
        poison = step == 2
        expected, found = train(here, step, poison), train(there, step, poison)
        if poison:
            assert found[2] == expected[2] == 1.0
        else:
            assert found == pytest.approx(expected, rel=1e-5), step
    for label in (None, "0.9", "power_0.1"):
        expected = here.weights() if label is None else here.ema_weights(label)
        found = there.weights() if label is None else there.ema_weights(label)
        for name, value in expected.items():
            assert distance(found[name], value) <= 1e-5, (label, name)
    assert there.scalar_state() == here.scalar_state()


def test_a_run_equals_the_cpus_and_each_resumes_the_others_checkpoint(run_config: RunConfig, tmp_path: Path) -> None:
    whole = run_config(tmp_path / "cpu", "runtime.device=cpu")
    train_dit(whole)
    expected = losses(tmp_path / "cpu")
    train_dit(run_config(tmp_path / "xla", "runtime.device=xla"))
    assert_same_log(losses(tmp_path / "xla"), expected)
    for first, second in (("cpu", "xla"), ("xla", "cpu")):
        folder = tmp_path / f"{first}-{second}"
        train_dit(run_config(folder, f"runtime.device={first}", "training.max_steps=3"))
        train_dit(run_config(folder, f"runtime.device={second}"))
        assert_same_log(losses(folder), expected)
        for name in ("ema-0.9.safetensors", "ema-power_0.1.safetensors"):
            there = load_file(folder / "run/export" / name)
            for key, value in load_file(tmp_path / "cpu/run/export" / name).items():
                assert distance(there[key], value) <= 1e-4, (folder.name, name, key)


def test_nothing_compiles_after_the_first_steps_and_nothing_falls_back(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rae_fast.training import dit_trainer

    counts = []
    plain_step = dit_trainer.DiTRun.one_step

    def counted(self: dit_trainer.DiTRun, *args: object) -> None:
        plain_step(self, *args)
        counts.append(compilations())

    monkeypatch.setattr(dit_trainer.DiTRun, "one_step", counted)
    before = set(fallbacks())
    config = run_config(tmp_path, "runtime.device=xla", "training.max_steps=12", "training.checkpoint_every=null")
    train_dit(config)
    assert len(counts) == 12
    # Six epochs of two steps. The log reads the figures of two steps before, from the third step on.
    assert counts[-1] == counts[3], str(counts)
    assert set(fallbacks()) <= before | {"aten::_local_scalar_dense"}, fallbacks()


def run_tool(arguments: list[str], processes: int = 1, **environment: str) -> None:
    # --standalone takes a free port
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launcher if processes > 1 else [sys.executable]), str(ROOT / "tools/train_dit.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_give_the_single_ones_result(run_arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    run_tool([*run_arguments(tmp_path / "one"), "--device", "xla"])
    run_tool([*run_arguments(tmp_path / "two"), "--device", "xla"], processes=2)
    assert_same_log(losses(tmp_path / "two"), losses(tmp_path / "one"))


def test_weights_cut_over_two_devices_give_the_same_result(
    run_config: RunConfig, run_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    train_dit(run_config(tmp_path / "cpu", "runtime.device=cpu"))
    run_tool([*run_arguments(tmp_path / "two"), "--device", "xla", "runtime.spmd=true"], CPU_NUM_DEVICES="2")
    assert_same_log(losses(tmp_path / "two"), losses(tmp_path / "cpu"))
