"""Timing on a CUDA device as all GPU benchmarks do it: events, warm-up, contenders in turn, medians and quantiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from rae_kernels.tuner import median_us
from results_file import row

ROUNDS, REPEATS = 3, 10


def compete(
    contenders: Mapping[str, Callable[[], object]], refused: tuple[type[Exception], ...] = ()
) -> dict[str, list[float]]:
    """Microseconds of each contender, all in turn in every round; one that cannot run here is left out and named."""
    times: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        for name, run in contenders.items():
            if number and name not in times:
                continue
            try:
                times.setdefault(name, []).extend(median_us(run, REPEATS))
            except refused as error:
                print(f"{name} cannot run here: {error}")
                times.pop(name, None)
    return times


def rows_of(label: str, times: Mapping[str, list[float]], **work: float) -> list[dict[str, Any]]:
    """Result rows; `work` is bytes=... or flops=..., from which achieved TB/s or TFLOP/s follow."""
    made = []
    for name, samples in times.items():
        median = sorted(samples)[len(samples) // 2]
        rates = {f"achieved_t{unit}_s": round(amount / median / 1e6, 3) for unit, amount in work.items()}
        made.append(row(f"{label} / {name}", samples, "us", **rates))
    return made


def ceilings() -> dict[str, float]:
    """What this device reaches: a large copy in TB/s (read and written) and a large bfloat16 product in TFLOP/s."""
    return {"copy_tb_s": _copy_rate(1 << 31), "product_tflop_s": _product_rate(8192)}


def _copy_rate(size_bytes: int) -> float:
    source = torch.randint(256, (size_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size_bytes / min(median_us(lambda: target.copy_(source))) / 1e6


def _product_rate(side: int) -> float:
    a, b = (torch.randn(side, side, device="cuda").to(torch.bfloat16) for _ in range(2))
    return 2 * side**3 / sorted(median_us(lambda: a @ b, REPEATS))[REPEATS // 2] / 1e6


def both_ways(forward: Callable[[], Any], inputs: list[torch.Tensor]) -> Callable[[], object]:
    """A run of forward and backward with a fixed random gradient."""
    out = forward()
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    upstream = [torch.randn_like(o) for o in outputs]

    def run() -> object:
        made = forward()
        return torch.autograd.grad([made] if isinstance(made, torch.Tensor) else list(made), inputs, upstream)

    return run
