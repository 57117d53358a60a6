"""Measures which configuration of each kernel is the fastest on this GPU, and whether the kernel is worth taking.

Every rank runs what rank 0 measured. Candidates are those that leave nothing spilled on sm_90; another GPU leaves out
what does not fit it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rae_kernels import attention, launches, tuning
from rae_kernels.launches import Maker, Stack

WARM_UP, REPEATS = 3, 15
Say = Callable[[str], None]


class Finding(NamedTuple):
    """One decision: the operation, its shape, the winner, and the median microseconds of each candidate."""

    operation: str
    shape: dict[str, int]
    config: dict[str, Any]
    times_us: dict[str, float]


def candidates(operation: str, tokens: int) -> list[dict[str, int]]:
    """Configurations worth timing.

    Raises:
        KeyError: an operation without candidates.
    """
    tiles = [
        {"queries": q, "keys": k, "warps": w, "stages": s}
        for q, k, w, s in [
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 1), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 8, 2),
            (64, 128, 8, 2), (64, 128, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 32, 4, 2), (128, 128, 8, 2),
        ]
    ]  # fmt: skip
    rows = [{"rows": r, "warps": w} for r, w in itertools.product((1, 4, 16), (1, 2, 4, 8))]
    sums = [{"rows": r, "warps": w} for r, w in itertools.product((32, 64, 128, 256), (2, 4, 8)) if r <= tokens]
    gates = [
        {"rows": r, "columns": c, "warps": c // 256} for r, c in itertools.product((16, 64, 256), (512, 1024, 2048))
    ]
    return {
        "attention.forward": [t for t in tiles if t["queries"] >= 64],
        "attention.backward.queries": [t for t in tiles if t["queries"] >= 64],
        # Three programs share a multiprocessor if a thread keeps to 168 registers.
        "attention.backward.keys": [*tiles, *({**t, "registers": 168} for t in tiles if t["warps"] == 4)],
        "norm_modulate.forward": rows,
        "norm_modulate.backward": sums,
        "swiglu.forward": [{**g, "rows": g["rows"] // 16} for g in gates],
        "swiglu.backward": gates,
    }[operation]


def median_us(run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Microseconds of each of some runs, by events of the current CUDA stream, after a warm-up."""
    for _ in range(WARM_UP):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in marks]


def tune(
    stack: Stack, make: Maker, path: Path, say: Say, kinds: Sequence[str] = ("norm", "attention", "swiglu")
) -> Iterator[Finding]:
    """Measure the kernels of one stack of blocks and record the winners in the table at `path`."""
    device = torch.device(make.device)
    width = stack.width // stack.heads
    shapes = {
        launches.norm_launches: {"tokens": make.tokens, "width": stack.width, "per_token": stack.per_token},
        launches.attention_launches: {"tokens": make.tokens, "head": width},
        launches.swiglu_launches: {"hidden": stack.hidden},
    }
    for build, shape in shapes.items():
        for operation in build(stack, make):
            if not operation.startswith(tuple(kinds)):
                continue
            direction = operation.split(".", 1)[1]

            def seconds(
                config: dict[str, int], build: Any = build, direction: str = direction, operation: str = operation
            ) -> float:
                return statistics.median(median_us(build(stack, make, {direction: config})[operation].run)) / 1e6

            best, times = tuning.fastest(candidates(operation, make.tokens), seconds)
            dtype = stack.stream if operation.startswith("norm") else make.dtype
            tuning.record(operation, shape, dtype, device, best, path)
            finding = Finding(operation, shape, best, {name: 1e6 * t for name, t in times.items()})
            say(f"{operation} {tuning.describe(shape)}: {best} in {min(finding.times_us.values()):.1f} us")
            yield finding
    if "attention" in kinds:
        yield choose_attention(stack, make, path, say)


def choose_attention(stack: Stack, make: Maker, path: Path, say: Say) -> Finding:
    """Take the kernel or PyTorch's attention with compiled rotation, whichever is faster forward and backward."""
    given = launches.attention_given(stack, make)
    leaves = given._replace(qkv=given.qkv.requires_grad_(), bias=given.bias.requires_grad_())
    compiled = torch.compile(attention.reference)
    contenders = {
        attention.TRITON: lambda: attention.attention(leaves, implementation=attention.TRITON),
        attention.SDPA: lambda: compiled(leaves, 1e-6),
    }
    upstream = torch.randn_like(contenders[attention.TRITON]())

    def both_ways(run: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(run(), [leaves.qkv, leaves.bias], upstream)

    times = {name: statistics.median(median_us(lambda run=run: both_ways(run))) for name, run in contenders.items()}
    config = {"implementation": min(times, key=times.__getitem__)}
    shape = {"tokens": make.tokens, "head": stack.width // stack.heads}
    tuning.record("attention", shape, make.dtype, torch.device(make.device), config, path)
    say(f"attention {tuning.describe(shape)}: {', '.join(f'{name} {us:.1f} us' for name, us in times.items())}")
    return Finding("attention", shape, config, times)


def ensure_tuned(stacks: Sequence[Stack], make: Maker, say: Say = print) -> None:
    """Measure, once for this machine and on rank 0 only, what no table knows; then let all ranks use rank 0's table."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if torch.device(make.device).type == "cuda" and (not distributed or torch.distributed.get_rank() == 0):
        for stack in stacks:
            shape = {"tokens": make.tokens, "head": stack.width // stack.heads}
            if not tuning.known("attention", shape, make.dtype, torch.device(make.device)):
                say(f"tuning the kernels of width {stack.width} for this GPU, once; kept in {tuning.cache_path()}")
                list(tune(stack, make, tuning.cache_path(), say))
    tuning.agree()
