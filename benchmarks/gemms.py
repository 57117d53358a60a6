"""Which of DiTDH's matrix products run at the device's rate, and what does padding the odd SwiGLU width gain?

    python benchmarks/gemms.py --model DiTDH-XL --samples 256 --out benchmarks/results/gemms-h200.json

Needs a CUDA device. Times each linear map of a training step in bfloat16: forward (y = x W^T), gradient of the input
(dx = dy W) and of the weight (dW = dy^T x), on random data; and the modulations of all trunk blocks as one product
against one for each block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import ceilings, compete, rows_of
from results_file import make_result, print_table, write_result
from torch import Tensor

from rae_fast.errors import UserError, exit_cleanly
from rae_fast.planner.roofline import Model, Stack, from_preset

GEMM_TILE = 128


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiTDH-XL")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks/gemms.py on a machine without a CUDA device", "a GPU", "run it there")
    reached = ceilings()
    model = from_preset(args.model, args.tokens, 768)
    rows = [r for name, shape in shapes(model, args.samples).items() for r in product_rows(name, *shape)]
    rows += modulation_rows(model.trunk, args.samples)
    question = f"How fast are {args.model}'s products, where 8192^3 run at {reached['product_tflop_s']:.0f} TFLOP/s?"
    result = make_result("gemms", question, rows[0]["name"], rows, "cuda", samples=args.samples, ceilings=reached)
    print_table(result)
    if args.out:
        write_result(args.out, result)


def shapes(model: Model, samples: int) -> dict[str, tuple[int, int, int]]:
    """(rows, inputs, outputs) of every linear map over tokens, by name; odd widths as they are and padded."""
    rows, made = samples * model.tokens, {}
    for name, stack in (("trunk", model.trunk), ("head", model.head)):
        if stack is None:
            continue
        width, padded = stack.width, -(-stack.hidden // GEMM_TILE) * GEMM_TILE
        made |= {f"{name} qkv": (rows, width, 3 * width), f"{name} proj": (rows, width, width)}
        for hidden in dict.fromkeys((stack.hidden, padded)):
            made[f"{name} w12 {hidden}"] = (rows, width, 2 * hidden)
            made[f"{name} w3 {hidden}"] = (rows, hidden, width)
        if stack.per_token:
            made[f"{name} modulation"] = (rows, width, stack.parts * width)
    final = model.final_width
    made |= {"final modulation": (rows, final, 2 * final), "final": (rows, final, model.out_values)}
    return made | {"embed": (rows, model.patch_values, model.trunk.width)}


def product_rows(name: str, rows: int, inputs: int, outputs: int) -> list[dict[str, Any]]:
    """Forward and both gradients of one linear map."""
    x, dy, weight = (_random(*shape) for shape in ((rows, inputs), (rows, outputs), (outputs, inputs)))
    forms: dict[str, Callable[[], Tensor]] = {
        "y": lambda: x @ weight.T,
        "dx": lambda: dy @ weight,
        "dW": lambda: dy.T @ x,
    }
    return rows_of(f"{name} [{rows}, {inputs}] -> {outputs}", compete(forms), FLOP=2.0 * rows * inputs * outputs)


def modulation_rows(stack: Stack, samples: int) -> list[dict[str, Any]]:
    """All blocks' modulations of one condition per sample: in turn, at once, and joined first."""
    condition = _random(samples, stack.width).requires_grad_()
    weights = [_random(stack.parts * stack.width, stack.width).requires_grad_() for _ in range(stack.depth)]
    joined = torch.cat([w.detach() for w in weights]).requires_grad_()
    upstream = _random(samples, len(joined))

    def backward(out: Tensor, leaves: list[Tensor]) -> object:
        return torch.autograd.grad(out, leaves, upstream)

    forms = {
        "in turn": lambda: backward(torch.cat([condition @ w.T for w in weights], 1), [condition, *weights]),
        "one product": lambda: backward(condition @ joined.T, [condition, joined]),
        "joined, then one product": lambda: backward(condition @ torch.cat(weights).T, [condition, *weights]),
    }
    flops = 3 * 2.0 * samples * joined.numel()
    return rows_of(f"modulation of {stack.depth} blocks, forward+backward", compete(forms), FLOP=flops)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    exit_cleanly(main)
