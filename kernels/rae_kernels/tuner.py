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
from rae_kernels.warm import Job, compile_ahead

WARM_UP, REPEATS = 3, 15
KINDS = ("norm_modulate", "attention", "swiglu", "interpolate", "adamw_ema", "crop")
FIXED = ("norm_modulate.finish",)  # too short to choose for
Say = Callable[[str], None]


class Work(NamedTuple):
    """One kernel to choose a configuration for: its key in the table, and what it is measured on."""

    operation: str
    shape: dict[str, int]
    dtype: torch.dtype
    stack: Stack
    make: Maker


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
        "interpolate": [{"blocks": b, "warps": w} for b, w in itertools.product((256, 512, 1024), (2, 4, 8))],
        "adamw_ema": [{"block": b, "warps": w} for b, w in itertools.product((512, 1024, 2048), (2, 4, 8))],
        "crop": [{"block": b, "warps": w} for b, w in itertools.product((256, 512, 1024), (4, 8))],
    }[operation]


def works(stack: Stack, make: Maker, kinds: Sequence[str] = KINDS) -> list[Work]:
    """The kernels of these kinds that a step of such blocks starts."""
    bare = make._replace(device="meta")
    head = {"tokens": make.tokens, "head": stack.width // stack.heads}
    keys = {
        "norm_modulate": ({"tokens": make.tokens, "width": stack.width, "per_token": stack.per_token}, stack.stream),
        "attention": (head, make.dtype),
        "swiglu": ({"hidden": stack.hidden}, make.dtype),
        "interpolate": ({"elements": launches.LATENT_ELEMENTS}, torch.int8),
        "adamw_ema": ({"averages": 1}, make.dtype),
        "crop": ({"size": launches.CROP_SIZE}, torch.uint8),
    }
    made = []
    for kind in kinds:
        if kind == "swiglu" and not stack.hidden:
            continue
        operations = launches.STACKED[kind](stack, bare) if kind in launches.STACKED else (kind,)
        made += [Work(name, *keys[kind], stack, make) for name in operations if name not in FIXED]
    return made


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


def config_us(work: Work, config: dict[str, Any]) -> float:
    """Median microseconds of a kernel in one configuration."""
    return statistics.median(median_us(launches.launch_of(work.operation, work.stack, work.make, config).run))


def attention_us(stack: Stack, make: Maker) -> dict[str, float]:
    """Median microseconds, forward and backward, of the kernel and of PyTorch's attention with compiled rotation."""
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

    return {name: statistics.median(median_us(lambda run=run: both_ways(run))) for name, run in contenders.items()}


def tune(
    stacks: Sequence[Stack], make: Maker, path: Path, say: Say = print, kinds: Sequence[str] = KINDS
) -> Iterator[Finding]:
    """Measure what the table does not know yet of these stacks and write each winner down at `path` at once.

    All candidates are compiled first, many at a time: compiling takes seconds each, timing milliseconds.
    """
    device = torch.device(make.device)
    missing = {}
    for work in itertools.chain.from_iterable(works(stack, make, kinds) for stack in stacks):
        if not tuning.known(work.operation, work.shape, work.dtype, device):
            missing[work.operation, tuning.describe(work.shape), work.dtype] = work
    bare = make._replace(device="meta")
    jobs = [
        Job(work.operation, work.stack, bare, config)
        for work in missing.values()
        for config in candidates(work.operation, make.tokens)
    ]
    if jobs:
        major, minor = torch.cuda.get_device_capability(device)
        say(f"compiling {len(jobs)} configurations of {len(missing)} kernels")
        compile_ahead(jobs, 10 * major + minor)
    for work in missing.values():
        best, times_s = tuning.fastest(
            candidates(work.operation, make.tokens), lambda config, work=work: config_us(work, config) / 1e6
        )
        times_us = {name: 1e6 * seconds for name, seconds in times_s.items()}
        say(f"{work.operation} {tuning.describe(work.shape)}: {best} in {min(times_us.values()):.1f} us")
        yield _decide(work.operation, work.shape, work.dtype, device, best, times_us, path)
    if "attention" in kinds:
        yield from choose_attention(stacks, make, path, say)


def choose_attention(stacks: Sequence[Stack], make: Maker, path: Path, say: Say) -> Iterator[Finding]:
    """Take the kernel or PyTorch's attention, whichever is faster forward and backward, for heads not decided yet."""
    device = torch.device(make.device)
    for stack in stacks:
        shape = {"tokens": make.tokens, "head": stack.width // stack.heads}
        if tuning.known("attention", shape, make.dtype, device):
            continue
        times_us = attention_us(stack, make)
        say(f"attention {tuning.describe(shape)}: {', '.join(f'{name} {us:.1f} us' for name, us in times_us.items())}")
        best = {"implementation": min(times_us, key=times_us.__getitem__)}
        yield _decide("attention", shape, make.dtype, device, best, times_us, path)


def _decide(
    operation: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
    config: dict[str, Any],
    times_us: dict[str, float],
    path: Path,
) -> Finding:
    tuning.record(operation, shape, dtype, device, config, path)
    return Finding(operation, shape, config, times_us)


def ensure_tuned(stacks: Sequence[Stack], make: Maker, say: Say = print) -> None:
    """Measure, once for this machine and on rank 0 only, what no table knows; then let all ranks use rank 0's table."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if torch.device(make.device).type == "cuda" and (not distributed or torch.distributed.get_rank() == 0):
        for finding in tune(stacks, make, tuning.cache_path(), lambda _: None, launches.STACKED):
            say(f"tuned once for this GPU, kept in {tuning.cache_path()}: {finding.operation} {finding.config}")
        torch.cuda.empty_cache()
    tuning.agree()
