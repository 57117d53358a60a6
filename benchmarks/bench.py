"""Every benchmark that runs on this machine, then the report: `make bench`, under 20 minutes on two quiet cores.

    python benchmarks/bench.py
    python benchmarks/bench.py --only store end_to_end --results /tmp/results
    python benchmarks/bench.py --short          # minutes, to see that all of it runs; its figures mean little

One benchmark after the other, each a process with a limit of its own; one that fails leaves its older result in place,
is named at the end, and makes the exit status 1. What only a GPU can say: `make gpu`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from results_file import RESULTS

from rae_fast.errors import UserError, exit_cleanly

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        name: of its script.
        arguments: settings of a real measurement; {out} is the folder of results.
        short: settings that take their place with --short.
        limit_s: seconds after which it is ended.
    """

    name: str
    arguments: str
    short: str
    limit_s: float = 300.0


BENCHES = (
    Bench("decode", "--images 512 --rounds 5 --out {out}/decode-cpu.json", "--images 64 --rounds 1"),
    Bench("store", "--images 1024 --rounds 5 --out {out}/store.json", "--images 512 --batches 1 --rounds 1"),
    Bench(
        "encode",
        "--what encoder,build --layers 2 --batches 8 --precisions fp32 --images 64 --rounds 3 --device cpu "
        "--out {out}/encode-cpu.json",
        "--rounds 1",
    ),
    Bench("decoder_step", "--rounds 5 --steps 2 --device cpu --output {out}/decoder_step-cpu.json", "--rounds 1"),
    Bench(
        "train_step",
        "--model tiny --batch 16 --steps 10 --compile off --kernels torch --precision fp32 --engine deepspeed ddp "
        "--out {out}/train_step-cpu.json",
        "--steps 2",
    ),
    Bench("sampling", "--rounds 3 --device cpu --output {out}/sampling-cpu.json", "--rounds 1"),
    Bench(
        "loader_scaling",
        "--images 512 --batches 16 --rounds 2 --out {out}/loader_scaling.json",
        "--images 128 --batch 16 --batches 8 --steps 12 --rounds 1",
    ),
    Bench("simulate", "--measured {out}/loader_scaling.json --out {out}/simulate.json", ""),
    Bench("planner", "--device cpu --batch 8 --rounds 4 --out {out}/planner-cpu.json", "--batch 4 --rounds 1"),
    Bench(
        "end_to_end",
        "--images 1024 --epochs 3 --rounds 3 --out {out}/end_to_end-cpu.json",
        "--images 128 --batch 32 --epochs 2 --rounds 1",
        780.0,
    ),
    Bench("report", "--results {out}", ""),
)


def main() -> int:
    """Run them in turn; status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", help="some of the benchmarks, by name")
    parser.add_argument("--short", action="store_true", help="see that all of it runs")
    args = parser.parse_args()
    names = [bench.name for bench in BENCHES]
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}", f"some of {', '.join(names)}")
    if args.short and args.results == RESULTS:
        raise UserError("--short with the folder of committed results", "another --results")
    args.results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    outcomes = {}
    for bench in BENCHES:
        if not args.only or bench.name in args.only:
            outcomes[bench.name] = run(bench, args.results.resolve(), args.short)
            print(f"{bench.name}: {outcomes[bench.name]}", flush=True)
    failed = [name for name, outcome in outcomes.items() if not outcome.startswith("done")]
    print(f"{time.monotonic() - began:.0f} s in all; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def run(bench: Bench, results: Path, short: bool) -> str:
    """How one benchmark ended."""
    # Of an option given twice, the last one counts.
    settings = f"{bench.arguments} {bench.short if short else ''}".format(out=results)
    began = time.monotonic()
    command = [sys.executable, str(HERE / f"{bench.name}.py"), *settings.split()]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(bench.limit_s * (4 if short else 1))
    except subprocess.TimeoutExpired:
        return f"cut off after {bench.limit_s:.0f} s"
    finally:
        end_group(process)
    return f"done in {time.monotonic() - began:.0f} s" if status == 0 else f"failed with status {status}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a benchmark and the processes that it started: left alone, they would slow the next one down."""
    # Interrupted, it removes its temporary folders.
    for number, patience_s in ((signal.SIGINT, 20.0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    exit_cleanly(main)
