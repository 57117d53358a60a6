"""Models that run the kernels still compute the reference's numbers: golden files, compilation, choice of kernels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rae_fast.dit import build_dit, fused
from rae_fast.dit.blocks import PLAIN, AdaLNBlock, SwiGLU
from rae_fast.dit.embed import RotaryTable
from rae_fast.dit.fused import FUSED, TORCH, TRITON, use_kernels

from .exactness import relative_error
from .models import small_model

STAGE_2 = Path(__file__).parents[1] / "golden" / "data" / "stage2"
FILES = sorted(path.stem for pattern in ("ddt_*.npz", "ldit_*.npz") for path in STAGE_2.glob(pattern))
FORWARD_GATE, GRADIENT_GATE = 1e-5, 5e-5


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


def test_kernels_are_chosen_for_every_block_and_given_back() -> None:
    model = small_model()
    use_kernels(model, TRITON)
    chosen = [m.operations for m in model.modules() if hasattr(m, "operations")]
    # Three blocks with attention and feed-forward each, and the last layer.
    assert chosen == [FUSED] * 10
    use_kernels(model, TORCH)
    assert all(m.operations is PLAIN for m in model.modules() if hasattr(m, "operations"))


def check_compilation(backend: str = "aot_eager") -> None:
    """A block is one graph, forward and backward, that computes what the block itself does."""
    model = small_model()
    inputs = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([1, 4])
    plain = model(*inputs)
    use_kernels(model, TRITON)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
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
    x, t, y = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([1, 4])
    exact = model(x, t, y)
    errors = {}
    for kernels in (TORCH, TRITON):
        use_kernels(model, kernels)
        with torch.autocast("cpu", torch.bfloat16):
            errors[kernels] = relative_error(model(x, t, y), exact)
    assert errors[TRITON] <= 1.5 * errors[TORCH] + 1e-3


@pytest.mark.slow
def test_a_block_compiles_whole_with_inductor() -> None:
    check_compilation("inductor")


def gpu_block(width: int, heads: int, per_token: bool) -> tuple[AdaLNBlock, tuple]:
    """A block with bfloat16 parameters on the GPU, and its inputs."""
    torch.manual_seed(0)
    flags = {"mlp_ratio": 4.0, "use_qknorm": False, "use_swiglu": True, "use_rmsnorm": True, "wo_shift": False}
    block = AdaLNBlock(width, heads, per_token=per_token, **flags)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    block = block.to("cuda", torch.bfloat16)
    x = torch.randn(4, 256, width, device="cuda", dtype=torch.bfloat16 if per_token else torch.float32)
    condition = torch.randn(4, 256 if per_token else 1, width, device="cuda", dtype=torch.bfloat16)
    return block, (x.requires_grad_(), condition.requires_grad_(), RotaryTable(width // heads, 16).cuda()())


def run_block(module: nn.Module, inputs: tuple) -> list[Tensor]:
    """Output and gradients of the inputs and all parameters."""
    out = module(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return [out, *torch.autograd.grad(out, [*inputs[:2], *module.parameters()], upstream)]


BLOCKS = [(384, 6, False), (1152, 16, False), (2048, 16, True)]


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "sdpa"])
@pytest.mark.parametrize(("width", "heads", "per_token"), BLOCKS)
def test_blocks_on_a_gpu_are_as_exact_as_plain_ones_and_repeat_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, width: int, heads: int, per_token: bool, implementation: str
) -> None:
    monkeypatch.setattr(fused.attention_kernel, "chosen", lambda *_: implementation)
    block, inputs = gpu_block(width, heads, per_token)
    use_kernels(block, TRITON)
    fast, again = run_block(block, inputs), run_block(block, inputs)
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))
    use_kernels(block, TORCH)
    plain = run_block(block, inputs)
    exact_block = copy.deepcopy(block).double()
    exact_inputs = (*(t.detach().double().requires_grad_() for t in inputs[:2]), tuple(t.double() for t in inputs[2]))
    exact = run_block(exact_block, exact_inputs)
    for ours, theirs, truth in zip(fast, plain, exact, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth) + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "heads", "per_token"), BLOCKS)
def test_a_block_compiles_whole_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, width: int, heads: int, per_token: bool
) -> None:
    monkeypatch.setattr(fused.attention_kernel, "chosen", lambda *_: "triton")
    block, inputs = gpu_block(width, heads, per_token)
    use_kernels(block, TRITON)
    plain = run_block(block, inputs)
    compiled = run_block(torch.compile(block, fullgraph=True, dynamic=False), inputs)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert relative_error(ours, theirs) <= 1e-2


@pytest.mark.gpu
def test_a_block_is_captured_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.attention_kernel, "chosen", lambda *_: "triton")
    block, inputs = gpu_block(1152, 16, False)
    use_kernels(block, TRITON)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run_graphed(block, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_graphed(block, inputs)
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    found = [t.clone() for t in captured]
    for ours, theirs in zip(found, run_graphed(block, inputs), strict=True):
        assert torch.equal(ours, theirs)


def run_graphed(block: nn.Module, inputs: tuple) -> list[Tensor]:
    """Output and gradients, with an upstream gradient that is made on the device."""
    out = block(*inputs)
    return [out, *torch.autograd.grad(out, [*inputs[:2], *block.parameters()], torch.ones_like(out))]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [TORCH, TRITON])
def test_the_odd_width_is_padded_exactly_on_a_gpu(kernels: str) -> None:
    """5461 hidden channels: values and gradients are those of the unpadded map, and shapes are the official ones."""
    torch.manual_seed(0)
    padded = SwiGLU(64, 5461).cuda()
    use_kernels(padded, kernels)
    x = torch.randn(3, 64, device="cuda")
    exact = copy.deepcopy(padded).double().cpu()
    use_kernels(exact, TORCH)
    assert padded.w12(x).shape[-1] == 2 * 5504 and exact.w12(x.double().cpu()).shape[-1] == 2 * 5461
    found = [padded(x), *torch.autograd.grad(padded(x).square().sum(), padded.parameters())]
    x = x.double().cpu()
    truth = [exact(x), *torch.autograd.grad(exact(x).square().sum(), exact.parameters())]
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.shape == theirs.shape and relative_error(ours.cpu(), theirs) <= 1e-5
