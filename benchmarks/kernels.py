"""Does each kernel beat what PyTorch compiles and its best library, forward and backward, at DiTDH's shapes?

    python benchmarks/kernels.py --out benchmarks/results/kernels.json
    python benchmarks/kernels.py --what attention block --tune benchmarks/results/tuning/tuned.json

Needs a CUDA device. Baseline of every operation is torch.compile of its plain reference; for attention that is compiled
rotation and PyTorch's own attention, beside each of its backends. Achieved TB/s and TFLOP/s count each tensor read and
written once, and the products that the mathematics asks for; the device's own copy and product stand above the table.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import both_ways, ceilings, compete, rows_of
from rae_kernels import attention, crop, interpolate, launches, norm_modulate, swiglu, tuner, tuning
from rae_kernels.launches import STACKS, Maker, Stack
from results_file import make_result, print_table, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae_fast.dit.blocks import AdaLNBlock
from rae_fast.dit.embed import RotaryTable
from rae_fast.dit.fused import TORCH, TRITON, use_kernels
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.provenance import write_json

# A long-sequence case beside the stacks' own: 512 px.
SAMPLES, LONG_SAMPLES, LONG_TOKENS = 256, 64, 1024
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PHOTOGRAPHS = 64
Rows = list[dict[str, Any]]


def main() -> int:
    """Parse the command line, tune if asked to, measure, print, write; status 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="samples of a batch at 256 tokens")
    parser.add_argument("--tune", type=Path, help="first time all configurations; the whole table goes here as well")
    parser.add_argument("--kinds", nargs="+", choices=tuner.KINDS, default=list(tuner.KINDS), help="what to tune")
    parser.add_argument("--out", type=Path, help="write the results here as JSON, one file for each of --what")
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
        tune_all(args.tune, args.kinds, [short, long])
    failed = [kind for kind in args.what if not measured(kind, short, long, args.out, reached)]
    print(f"not measured: {', '.join(failed) or 'nothing'}")
    return int(bool(failed))


def tune_all(path: Path, kinds: list[str], makes: list[Maker]) -> None:
    """Time the configurations that no table knows, and write the whole table, and all times beside it."""
    found = []
    for make in makes:
        for finding in tuner.tune(list(STACKS.values()), make, tuning.cache_path(), partial(print, flush=True), kinds):
            found.append(finding._asdict())
            tuning.write(path, tuning.read(tuning.COMMITTED) | tuning.read(tuning.cache_path()))
            write_json(path.with_stem(f"{path.stem}-times"), found)


def measured(kind: str, short: Maker, long: Maker, out: Path | None, reached: dict[str, float]) -> bool:
    """Measure, print and write one kind; an error is printed, so that a blind run goes on with the next kind."""
    try:
        rows = MEASURES[kind](short, long)
        question = f"How long does each form of {kind} take?"
        facts = {"samples": short.samples, "ceilings": reached}
        result = make_result("kernels", question, rows[0]["name"], rows, "cuda", **facts)
        print_table(result)
        if out:
            write_result(out.with_stem(f"{out.stem}-{kind}"), result)
    except Exception:
        traceback.print_exc()
        return False
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return True


def of_stacks(rows: Callable[[str, Stack, Maker], Rows], *makes: Maker) -> Rows:
    """The rows of every width of blocks."""
    return [row for make in makes for name, stack in STACKS.items() for row in rows(name, stack, make)]


def sdpa_rows(name: str, stack: Stack, make: Maker) -> Rows:
    """PyTorch's own attention by backend on views of packed projections, nothing around it."""
    qkv = launches.attention_given(stack, make).qkv
    leaves = [part.transpose(1, 2).detach().requires_grad_() for part in qkv.unbind(2)]

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*leaves)

    forms = {backend: partial(run, value) for backend, value in BACKENDS.items()}
    return two_ways(f"sdpa {name} {heads_of(stack, make)}", forms, leaves, attention_flop(stack, make))


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
    given, made = _bytes(terms), _bytes(kernel())
    # Backward reads the outputs' gradients and the inputs again (x' for x), and writes the inputs' gradients.
    return [
        *rows_of(f"norm {name} forward", compete(forms), B=given + made),
        *rows_of(f"norm {name} forward+backward", compete(_both(forms, list(terms))), B=3 * given + 2 * made),
    ]


def attention_rows(name: str, stack: Stack, make: Maker) -> Rows:
    """Attention with rotation: compiled around each of PyTorch's backends, and the kernel."""
    given = launches.attention_given(stack, make)
    given = given._replace(qkv=given.qkv.requires_grad_(), bias=given.bias.requires_grad_())
    forms: dict[str, Callable[[], Tensor]] = {
        f"compiled, {backend}": partial(compiled_with(value), given) for backend, value in BACKENDS.items()
    }
    forms["eager"] = lambda: attention.reference(given, 1e-6)
    forms["kernel"] = lambda: attention.attention(given, implementation=attention.TRITON)
    label = f"attention {name} {heads_of(stack, make)}"
    return two_ways(label, forms, [given.qkv, given.bias], attention_flop(stack, make))


def heads_of(stack: Stack, make: Maker) -> str:
    """Tokens and head width, as rows are named by."""
    return f"N={make.tokens} D={stack.width // stack.heads}"


def attention_flop(stack: Stack, make: Maker) -> float:
    """FLOPs of one attention's two products."""
    return 4.0 * make.samples * make.tokens**2 * stack.width


def two_ways(label: str, forms: dict[str, Callable[[], Any]], inputs: list[Tensor], flop: float) -> Rows:
    """Rows forward, and forward and backward; a form that this machine or library refuses is left out and named."""
    refused = (RuntimeError,)
    rows = rows_of(f"{label} forward", compete(forms, refused), FLOP=flop)
    return rows + rows_of(f"{label} forward+backward", compete(_both(forms, inputs), refused), FLOP=3 * flop)


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
    flop = 2.0 * make.samples * make.tokens * stack.hidden * stack.width
    return two_ways(f"swiglu {name}", forms, [x12, bias, weight], flop)


def block_rows(name: str, stack: Stack, make: Maker) -> Rows:
    """A whole block with bfloat16 parameters, forward and backward: compiled, eager, with kernels both ways."""
    flags = {"mlp_ratio": 4.0, "use_qknorm": False, "use_swiglu": True, "use_rmsnorm": True, "wo_shift": False}
    block = AdaLNBlock(stack.width, stack.heads, per_token=stack.per_token, **flags).to("cuda", torch.bfloat16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    rope = RotaryTable(stack.width // stack.heads, round(make.tokens**0.5)).cuda()()
    condition = make(make.samples, make.tokens if stack.per_token else 1, stack.width).requires_grad_()
    x, compiled = make.rows(stack.width, stack.stream).requires_grad_(), torch.compile(block, dynamic=False)

    def run(kernels: str, module: Callable[..., Tensor]) -> Tensor:
        use_kernels(block, kernels)
        return module(x, condition, rope)

    forms = {
        "compiled": partial(run, TORCH, compiled),
        "eager": partial(run, TORCH, block),
        "kernels": partial(run, TRITON, block),
        "kernels, compiled": partial(run, TRITON, compiled),
    }
    parameters = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    modulation = block.adaLN_modulation[1].weight.numel()
    rows = make.samples * make.tokens
    products = 2.0 * (rows * (parameters - modulation) + condition.shape[:2].numel() * modulation)
    flop = products + attention_flop(stack, make)
    times = compete(_both(forms, [x, condition, *block.parameters()]), (RuntimeError,))
    return rows_of(f"block {name} {heads_of(stack, make)} forward+backward", times, FLOP=3 * flop)


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
    launch = launches.optimizer_launch(Maker("cuda"), parameters=parameters)
    param, average = torch.nn.Parameter(launch.arguments["param"].clone()), launch.arguments["average0"]
    copy, param.grad = launch.arguments["copy"], launch.arguments["grad"].float()
    optimizer = torch.optim.AdamW([param], lr=2e-4, weight_decay=0.0, fused=True)

    def plain() -> None:
        optimizer.step()
        average.lerp_(param.detach(), 1 - 0.9995)
        copy.copy_(param.detach())

    forms = {"torch fused AdamW, lerp, cast": plain, "kernel": launch.run}
    return rows_of(f"optimizer {parameters / 1e6:.0f} M parameters", compete(forms), B=parameters * 36)


def crop_rows(make: Maker) -> Rows:
    """Crops of a batch of photographs: plain PyTorch's integers on the GPU, image by image, and the kernel."""
    images = torch.randint(256, (PHOTOGRAPHS, 375, 500, 3), dtype=torch.uint8, device=make.device)
    passes = launches.crop_passes()

    def kernel() -> Tensor:
        return crop.crop(list(images), [passes] * len(images), launches.CROP_SIZE)

    forms = {"eager": lambda: torch.stack([crop.reference(image, passes) for image in images]), "kernel": kernel}
    return rows_of(f"crop of {PHOTOGRAPHS} images", compete(forms), B=images.numel() * 2)


def _both(forms: dict[str, Callable[[], Any]], inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The forms forward and backward; each is set up when it first runs, so that one that cannot is refused there."""
    made: dict[str, Callable[[], object]] = {}

    def timed(name: str) -> object:
        if name not in made:
            made[name] = both_ways(forms[name], inputs)
        return made[name]()

    return {name: (lambda name=name: timed(name)) for name in forms}


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


MEASURES: dict[str, Callable[[Maker, Maker], Rows]] = {
    "sdpa": lambda short, long: of_stacks(sdpa_rows, short, long),
    "norm": lambda short, long: of_stacks(norm_rows, short),
    "attention": lambda short, long: of_stacks(attention_rows, short, long),
    "swiglu": lambda short, long: of_stacks(swiglu_rows, short),
    "pair": lambda short, long: pair_rows(short),
    "optimizer": lambda short, long: optimizer_rows(),
    "crop": lambda short, long: crop_rows(short),
    "block": lambda short, long: of_stacks(block_rows, short),
}

if __name__ == "__main__":
    exit_cleanly(main)
