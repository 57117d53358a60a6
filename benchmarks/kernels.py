"""Does each kernel beat what PyTorch compiles and its best library, forward and backward, at DiTDH's shapes?

    python benchmarks/kernels.py --out benchmarks/results/kernels-h200.json
    python benchmarks/kernels.py --what attention --tune kernels/rae_kernels/tuned.json

Needs a CUDA device. Baseline of every operation is torch.compile of its plain reference; for attention that is compiled
rotation and PyTorch's own attention, beside each of its backends. Achieved TB/s and TFLOP/s count each tensor read and
written once, and the products that the mathematics asks for; the device's own copy and product stand above the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import both_ways, ceilings, compete, rows_of
from rae_kernels import attention, interpolate, launches, norm_modulate, swiglu, tuner
from rae_kernels.launches import STACKS, Maker, Stack
from results_file import make_result, print_table, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae_fast.errors import UserError, exit_cleanly
from rae_fast.provenance import atomic_write

KINDS = ("norm", "attention", "swiglu", "pair", "optimizer")
# A long-sequence case beside the stacks' own: 512 px.
SAMPLES, LONG_SAMPLES, LONG_TOKENS = 256, 64, 1024
Rows = list[dict[str, Any]]


def main() -> None:
    """Parse the command line, tune if asked to, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="samples of a batch at 256 tokens")
    parser.add_argument("--tune", type=Path, help="first time all configurations and write the best to this table")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("benchmarks/kernels.py on a machine without a CUDA device", "a GPU", "run it there")
    # The same graph runs backward many times.
    torch._functorch.config.donated_buffer = False
    reached = ceilings()
    print(f"copy {reached['copy_tb_s']:.2f} TB/s, product {reached['product_tflop_s']:.0f} TFLOP/s", flush=True)
    short = Maker("cuda", args.samples)
    long = Maker("cuda", max(1, args.samples * LONG_SAMPLES // SAMPLES), LONG_TOKENS)
    if args.tune:
        tune_all(args.tune, args.what, [short, long])
    measure: dict[str, Callable[[], Rows]] = {
        "norm": lambda: [r for name, stack in STACKS.items() for r in norm_rows(name, stack, short)],
        "attention": lambda: [
            r for make in (short, long) for name, stack in STACKS.items() for r in attention_rows(name, stack, make)
        ],
        "swiglu": lambda: [r for name, stack in STACKS.items() for r in swiglu_rows(name, stack, short)],
        "pair": lambda: pair_rows(short),
        "optimizer": optimizer_rows,
    }
    for kind in args.what:
        rows = measure[kind]()
        question = f"How long does each form of {kind} take?"
        result = make_result("kernels", question, rows[0]["name"], rows, "cuda", samples=args.samples, ceilings=reached)
        print_table(result)
        if args.out:
            write_result(args.out.with_stem(f"{args.out.stem}-{kind}"), result)


def tune_all(path: Path, kinds: list[str], makes: list[Maker]) -> None:
    """Time every configuration and keep the winners, and a file of all times beside them."""
    log = []
    for make in makes:
        for stack in STACKS.values():
            log += [f"{f.operation} {f.shape}: {f.times_us}" for f in tuner.tune(stack, make, path, print, kinds)]
            torch.cuda.empty_cache()
    with atomic_write(path.with_suffix(".log")) as file:
        file.write("\n".join(log).encode())


def norm_rows(name: str, stack: Stack, make: Maker) -> Rows:
    """Gated residual, norm and modulation: eager, compiled, kernel."""
    terms = launches.norm_terms(stack, make)
    terms = type(terms)(*(t.detach().requires_grad_() for t in terms))
    compiled = torch.compile(norm_modulate.reference)

    def kernel() -> tuple[Tensor, ...]:
        return norm_modulate.residual_norm_modulate(*terms, 1e-6, False, make.dtype)[:2]

    forms = {
        "compiled": lambda: compiled(terms, 1e-6, False, make.dtype),
        "eager": lambda: norm_modulate.reference(terms, 1e-6, False, make.dtype),
        "kernel": kernel,
    }
    return [
        *rows_of(f"norm {name} forward", compete(forms), B=_moved(terms, kernel())),
        *rows_of(f"norm {name} forward+backward", compete(_both(forms, list(terms))), B=3 * _moved(terms, kernel())),
    ]


def attention_rows(name: str, stack: Stack, make: Maker) -> Rows:
    """Attention with rotation: compiled around each of PyTorch's backends, and the kernel."""
    given = launches.attention_given(stack, make)
    given = given._replace(qkv=given.qkv.requires_grad_(), bias=given.bias.requires_grad_())
    forms: dict[str, Callable[[], Tensor]] = {
        "compiled, cudnn": partial(compiled_with(SDPBackend.CUDNN_ATTENTION), given),
        "compiled, flash": partial(compiled_with(SDPBackend.FLASH_ATTENTION), given),
    }
    forms["eager"] = lambda: attention.reference(given, 1e-6)
    forms["kernel"] = lambda: attention.attention(given, implementation=attention.TRITON)
    tokens, width = make.tokens, stack.width
    flops = 4.0 * make.samples * tokens**2 * width
    label = f"attention {name} N={tokens} D={width // stack.heads}"
    refused = (RuntimeError,)
    rows = rows_of(f"{label} forward", compete(forms, refused), FLOP=flops)
    return rows + rows_of(
        f"{label} forward+backward", compete(_both(forms, [given.qkv, given.bias]), refused), FLOP=3 * flops
    )


def compiled_with(backend: SDPBackend) -> Callable[[attention.Given], Tensor]:
    """The reference compiled around one of PyTorch's attentions."""

    @torch.compile
    def run(given: attention.Given) -> Tensor:
        with sdpa_kernel(backend):
            return attention.reference(given, 1e-6)

    return run


def swiglu_rows(name: str, stack: Stack, make: Maker) -> Rows:
    """SwiGLU's gate and the linear map behind it: compiled, eager, kernel; backward is where they differ."""
    x12, bias = make.rows(2 * stack.hidden).requires_grad_(), make(2 * stack.hidden).requires_grad_()
    weight = (make(stack.width, stack.hidden) * stack.hidden**-0.5).requires_grad_()

    def plain(x12: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(swiglu.reference(x12, bias), weight)

    compiled = torch.compile(plain)
    forms = {
        "compiled": lambda: compiled(x12, bias, weight),
        "eager": lambda: plain(x12, bias, weight),
        "kernel": lambda: swiglu.gated_linear(x12, bias, weight, None),
    }
    flops = 2.0 * make.samples * make.tokens * stack.hidden * stack.width
    rows = rows_of(f"swiglu {name} forward", compete(forms), FLOP=flops)
    return rows + rows_of(f"swiglu {name} forward+backward", compete(_both(forms, [x12, bias, weight])), FLOP=3 * flops)


def pair_rows(make: Maker) -> Rows:
    """Training pairs from int8 latents: eager and compiled int64 arithmetic, and the kernel."""
    launch = launches.pair_launch(make)
    stored, scale, path, index = (launch.arguments[k] for k in ("stored", "scale", "path", "index"))

    def plain() -> tuple[Tensor, Tensor]:
        noise = interpolate.normal(1, 0, index, 0, launches.LATENT)
        return interpolate.reference(stored, scale, 1.0, path, noise, torch.float32)

    forms = {"compiled": torch.compile(plain), "eager": plain, "kernel": launch.run}
    return rows_of("training pair int8", compete(forms), B=stored.numel() * (1 + 4 + 4))


def optimizer_rows(parameters: int = 400_000_000) -> Rows:
    """One optimizer step with one average and a 16-bit copy: torch's fused AdamW, lerp and cast, and the kernel."""
    launch = launches.optimizer_launch(Maker("cuda"), parameters)
    param, average = torch.nn.Parameter(launch.arguments["param"].clone()), launch.arguments["average0"]
    copy, param.grad = launch.arguments["copy"], launch.arguments["grad"].float()
    optimizer = torch.optim.AdamW([param], lr=2e-4, weight_decay=0.0, fused=True)

    def plain() -> None:
        optimizer.step()
        average.lerp_(param.detach(), 1 - 0.9995)
        copy.copy_(param.detach())

    forms = {"torch fused AdamW, lerp, cast": plain, "kernel": launch.run}
    return rows_of(f"optimizer {parameters / 1e6:.0f} M parameters", compete(forms), B=parameters * 36)


def _both(forms: dict[str, Callable[[], Any]], inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The forms forward and backward; each is set up when it first runs, so that one that cannot is refused there."""
    made: dict[str, Callable[[], object]] = {}

    def timed(name: str) -> object:
        if name not in made:
            made[name] = both_ways(forms[name], inputs)
        return made[name]()

    return {name: (lambda name=name: timed(name)) for name in forms}


def _moved(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> int:
    """Bytes of all inputs and outputs, each once."""
    return sum(t.numel() * t.element_size() for t in (*inputs, *outputs))


if __name__ == "__main__":
    exit_cleanly(main)
