"""Everything that only a GPU can say, in parts that each end within 8 minutes: `make gpu PART=1`, PART=2, ...

    python benchmarks/gpu_parts.py --list
    python benchmarks/gpu_parts.py --part 2 --results benchmarks/results

Runs with torch, Triton, numpy and pytest alone, nothing installed: what needs a package that is missing is skipped with
a line, and so is everything on a machine without a CUDA device. Each step is a process of its own with what is left of
the part's time; its output goes to the screen and to results/gpu-part-<n>.log, so that a step that is cut off still
leaves what it had found. Parts are in the order in which their answers decide the next: run them so, one warm machine
for all if possible, as part 3 leaves its choices in the user's cache for the later ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).resolve().parents[1]
PART_S = 465.0
LEAST_S = 20.0
# What a whole training run takes beside torch.
PACKAGES = ("omegaconf", "zarr", "numcodecs")
DALI = "nvidia.dali"


@dataclass(frozen=True)
class Step:
    """One process of a part.

    Attributes:
        name: of the step and of its result file.
        command: after `python`; {results} is the folder of results.
        needs: packages without which it is skipped.
        limit_s: seconds after which it is ended, whatever is left of the part.
    """

    name: str
    command: str
    needs: tuple[str, ...] = ()
    limit_s: float = PART_S


PARTS: dict[int, tuple[str, tuple[Step, ...]]] = {
    1: (
        "matrix products and PyTorch's attention at real shapes, beside the device's ceilings",
        (
            Step("gemms XL", "benchmarks/gemms.py --out {results}/gemms-DiTDH-XL.json", limit_s=150),
            Step("sdpa", "benchmarks/kernels.py --what sdpa --out {results}/kernels.json", limit_s=150),
            Step("gemms S", "benchmarks/gemms.py --model DiTDH-S --out {results}/gemms-DiTDH-S.json"),
        ),
    ),
    2: (
        "correctness of every kernel",
        (
            Step(
                "tests of kernels",
                "-m pytest -m gpu tests/kernels tests/dit --timeout 240 {parallel}",
                ("pytest", "pytest_timeout"),
            ),
        ),
    ),
    3: (
        "configurations of every kernel; gated residual, norm and modulation",
        (
            Step("tuning", "benchmarks/kernels.py --what --tune {results}/tuning/tuned.json", limit_s=380),
            Step("norm", "benchmarks/kernels.py --what norm --out {results}/kernels.json"),
        ),
    ),
    4: (
        "attention and SwiGLU against what PyTorch compiles",
        (Step("attention, SwiGLU", "benchmarks/kernels.py --what attention swiglu --out {results}/kernels.json"),),
    ),
    5: (
        "whole blocks; the kernels outside of the model",
        (Step("blocks", "benchmarks/kernels.py --what block pair optimizer crop --out {results}/kernels.json"),),
    ),
    6: (
        "training step of DiTDH-XL, kernels against plain PyTorch",
        (
            Step(
                "train step XL",
                "benchmarks/train_step.py --batch 128 --compile on --steps 10 --no-encoder "
                "--out {results}/train_step-DiTDH-XL.json",
            ),
        ),
    ),
    7: (
        "training step of DiTDH-S, kernels against plain PyTorch",
        (
            Step(
                "train step S",
                "benchmarks/train_step.py --model DiTDH-S --batch 256 --compile on --steps 10 --no-encoder "
                "--out {results}/train_step-DiTDH-S.json",
            ),
        ),
    ),
    8: (
        "the other tests marked gpu; decoding, encoding",
        (
            Step(
                "tests of training, sampling, evaluation",
                "-m pytest -m gpu tests/training/test_gpu.py tests/sampling/test_on_gpu.py "
                "tests/evaluation/test_gpu.py tests/autoencoder/test_step_gpu.py",
                ("pytest",),
                150,
            ),
            Step("tests of the cache", "-m pytest -m gpu tests/latents tests/images", ("pytest", *PACKAGES, DALI), 110),
            Step("decode", "benchmarks/decode.py --device cuda --out {results}/decode-cuda.json", (DALI,), 110),
            Step(
                "encode",
                "benchmarks/encode.py --what encoder --batches 64,256 --device cuda --out {results}/encode-cuda.json",
                ("transformers",),
            ),
        ),
    ),
    9: (
        "sampling; decoder training",
        (
            Step(
                "sampling",
                "benchmarks/sampling.py --size DiTDH-XL --precision bf16 --compile --cuda-graphs --batch 64 --rounds 3 "
                "--output {results}/sampling-cuda.json",
                limit_s=280,
            ),
            Step(
                "decoder step",
                "benchmarks/decoder_step.py --size DINOv2-B_decXL --batch 32 --precision bf16 --compile --device cuda "
                "--rounds 3 --output {results}/decoder_step-cuda.json",
                ("torchvision", "transformers"),
            ),
        ),
    ),
    10: (
        "whole epochs from JPEG files",
        (
            Step(
                "end to end",
                "benchmarks/end_to_end.py --device cuda --images 2048 --epochs 2 --rounds 1 "
                "--out {results}/end_to_end-cuda.json",
                (*PACKAGES, DALI),
            ),
        ),
    ),
}


def main() -> int:
    """Parse the command line and run a part or all; status 1 if a step failed or was cut off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, help="one part; without it all, in turn")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--list", action="store_true", help="say what the parts are")
    args = parser.parse_args()
    if args.list:
        for number, (title, steps) in PARTS.items():
            print(f"{number}  {title}: {', '.join(step.name for step in steps)}")
        return 0
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    numbers = [args.part] if args.part else list(PARTS)
    outcomes = [outcome for number in numbers for outcome in run_part(number, results)]
    return int(any(outcome.startswith(("failed", "cut off")) for outcome in outcomes))


def run_part(number: int, results: Path) -> list[str]:
    """Run the steps of a part and print how each ended."""
    title, steps = PARTS[number]
    print(f"part {number}: {title}", flush=True)
    end, outcomes = time.monotonic() + PART_S, []
    with (results / f"gpu-part-{number}.log").open("w") as log:
        for step in steps:
            began = time.monotonic()
            outcome = obstacle(step) or run_step(step, min(step.limit_s, end - began), results, log)
            outcomes.append(outcome)
            print(f"part {number}, {step.name}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
            log.write(f"{step.name}: {outcome}\n")
    return outcomes


def obstacle(step: Step) -> str | None:
    """Why a step cannot run on this machine, or None."""
    if not torch.cuda.is_available():
        return "skipped, torch sees no CUDA device"
    missing = [package for package in step.needs if not has(package)]
    return f"skipped, not installed: {', '.join(missing)}" if missing else None


def has(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False  # not even its parent


def run_step(step: Step, limit_s: float, results: Path, log: IO[str]) -> str:
    """Run one step, pass its output on, end it after `limit_s`."""
    if limit_s < LEAST_S:
        return "cut off before it began: the part's time is over"
    parallel = "--numprocesses 4" if has("xdist") else ""
    command = step.command.format(results=results, parallel=parallel).split()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    # A session of its own, so that the limit ends its workers too.
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    watchdog = Watchdog(process, limit_s)
    with process.stdout:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    return watchdog.outcome()


class Watchdog:
    """Ends a process and its children at the limit, also while nothing is printed."""

    def __init__(self, process: subprocess.Popen[str], limit_s: float) -> None:
        self.process, self.limit_s, self.expired = process, limit_s, False
        signal.signal(signal.SIGALRM, self._expire)
        signal.setitimer(signal.ITIMER_REAL, limit_s)

    def _expire(self, _signal: int, _frame: object) -> None:
        self.expired = True
        os.killpg(self.process.pid, signal.SIGKILL)

    def outcome(self) -> str:
        """How the process ended."""
        status = self.process.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.expired:
            return f"cut off after {self.limit_s:.0f} s"
        return "done" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    sys.exit(main())
