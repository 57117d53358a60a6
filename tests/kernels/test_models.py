"""Models that run the kernels still compute the reference's numbers: golden files, compilation, choice of kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rae_fast.dit import build_dit
from rae_fast.dit.blocks import PLAIN
from rae_fast.dit.fused import FUSED, TORCH, TRITON, use_kernels

STAGE_2 = Path(__file__).parents[1] / "golden" / "data" / "stage2"
FILES = sorted(path.stem for pattern in ("ddt_*.npz", "ldit_*.npz") for path in STAGE_2.glob(pattern))
FORWARD_GATE, GRADIENT_GATE = 1e-5, 5e-5


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A golden file's facts and arrays."""
    with np.load(STAGE_2 / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"}
        return json.loads(str(file["meta"])), arrays


def build(meta: dict[str, Any], arrays: dict[str, Tensor]) -> nn.Module:
    model = build_dit(meta["kind"], meta["config"]).eval()
    model.load_state_dict({k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")})
    use_kernels(model, TRITON)
    return model


def check_golden(name: str) -> None:
    """Forward, loss and gradient of the latents are the reference's."""
    meta, arrays = load(name)
    model = build(meta, arrays)
    inputs = arrays["in/x"], arrays["in/t"], arrays["in/y"]
    with torch.no_grad():
        assert relative_error(model(*inputs), arrays["out/forward"]) <= FORWARD_GATE
    model.train().requires_grad_(True)
    model.y_embedder.dropout_prob = 0.0
    x = arrays["in/x"].requires_grad_(True)
    loss = model(x, *inputs[1:]).square().mean()
    loss.backward()
    gate = max(GRADIENT_GATE, 100 * meta["fp32_vs_f64_rel"])
    assert relative_error(x.grad, arrays["grad/x"]) <= gate
    with np.load(STAGE_2 / f"{name}.npz") as file:
        names = [str(n) for n in file["grad/param_names"]]
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.grad is not None} == set(names)
    for parameter, norm, cosdot in zip(names, arrays["grad/param_norms"], arrays["grad/param_cosdot"], strict=True):
        g = parameters[parameter].grad.double().flatten()
        assert (g.norm() - norm).abs() <= gate * norm, parameter
        ours = (g * torch.cos(0.1 * torch.arange(len(g), dtype=torch.float64))).sum()
        assert (ours - cosdot).abs() <= gate * norm * len(g) ** 0.5, parameter


@pytest.mark.parametrize("name", FILES)
def test_golden_models_with_kernels_on_a_cpu(name: str) -> None:
    check_golden(name)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["ddt_headdim72_128", "ddt_layernorm_gelu"])
def test_golden_models_through_the_kernels_themselves(name: str) -> None:
    check_golden(name)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("name", FILES)
def test_all_golden_models_through_the_kernels_themselves(name: str) -> None:
    check_golden(name)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    params = {"input_size": 4, "in_channels": 6, "hidden_size": [16, 24], "depth": [2, 1], "num_heads": [2, 2]}
    model = build_dit("DiTDH", {**params, "num_classes": 5})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def test_kernels_are_chosen_for_every_block_and_given_back() -> None:
    model = small_model()
    use_kernels(model, TRITON)
    chosen = [m.operations for m in model.modules() if hasattr(m, "operations")]
    # Three blocks with attention and feed-forward each, and the last layer.
    assert chosen == [FUSED] * 10
    use_kernels(model, TORCH)
    assert all(m.operations is PLAIN for m in model.modules() if hasattr(m, "operations"))


def check_compilation() -> None:
    """A block is one graph, forward and backward, that computes what the block itself does."""
    model = small_model()
    inputs = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([1, 5])
    plain = model(*inputs)
    use_kernels(model, TRITON)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = model(*inputs)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    compiled.square().mean().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_a_block_compiles_whole() -> None:
    check_compilation()


@pytest.mark.interpreter
def test_a_block_compiles_whole_around_the_kernels() -> None:
    check_compilation()


def test_kernels_agree_with_plain_blocks_under_autocast() -> None:
    model = small_model()
    x, t, y = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([1, 5])
    exact = model(x, t, y)
    errors = {}
    for kernels in (TORCH, TRITON):
        use_kernels(model, kernels)
        with torch.autocast("cpu", torch.bfloat16):
            errors[kernels] = relative_error(model(x, t, y), exact)
    assert errors[TRITON] <= 1.5 * errors[TORCH] + 1e-3
