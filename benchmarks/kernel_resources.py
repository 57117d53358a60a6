"""What does each kernel take of a GPU: registers, spills, shared memory, programs per multiprocessor, instructions?

    python benchmarks/kernel_resources.py
    python benchmarks/kernel_resources.py --only attention --tokens 1024 --candidates

Compiles for sm_90 with the tools in Triton's wheel: no GPU needed. `loads` are those from device memory by their width
in bytes; `wgmma` are Hopper's matrix instructions, and `mma` the older ones, which run at half their rate.
"""

from __future__ import annotations

import argparse

from rae_kernels import launches, resources, tuner
from rae_kernels.launch import Launch
from rae_kernels.launches import STACKS, Maker
from rae_kernels.resources import Resources

from rae_fast.errors import UserError, exit_cleanly

WIDTHS = {"LDG.E.128": 16, "LDG.E.64": 8, "LDG.E": 4, "LDG.E.U16": 2, "LDG.E.U8": 1, "LDG.E.S8": 1}


def main() -> int:
    """Parse the command line and print one line for each kernel; status 1 if a default configuration spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--candidates", action="store_true", help="every configuration that the tuner would time")
    args = parser.parse_args()
    make = Maker(tokens=args.tokens)
    made = of_candidates(make, args.only) if args.candidates else launches.training_launches(make)
    chosen = {name: launch for name, launch in made.items() if args.only in name}
    if not chosen:
        raise UserError(f"--only {args.only}", f"a part of one of {', '.join(made)}")
    width = max(map(len, chosen))
    print(f"{'':{width}}  warps  regs  spill  shared KB  per SM  wgmma  mma  instructions  loads by bytes")
    spilling = 0
    for name, launch in chosen.items():
        found = resources.compile_for(launch)
        spilling += found.spill_bytes > 0
        print(f"{name:{width}}  {line(found)}", flush=True)
    print(f"{spilling} of {len(chosen)} kernels spill")
    return int(spilling > 0 and not args.candidates)


def of_candidates(make: Maker, only: str) -> dict[str, Launch]:
    """The launches of all configurations that the tuner would time, by kernel, stack and configuration."""
    made = {}
    for stack_name, stack in STACKS.items():
        for work in tuner.works(stack, make, tuple(launches.STACKED)):
            if only not in f"{work.operation} {stack_name}":
                continue
            for config in tuner.candidates(work.operation, make.tokens):
                name = f"{work.operation} {stack_name} {' '.join(f'{k}={v}' for k, v in config.items())}"
                made[name] = launches.launch_of(work.operation, stack, make, config)
    return made


def line(found: Resources) -> str:
    """The figures of one kernel in the table's columns."""
    loads = [(size, found.instructions.get(name, 0)) for name, size in WIDTHS.items()]
    loads[0] = (16, loads[0][1] + found.count("LDGSTS.E.BYPASS.128"))
    by_width = " ".join(f"{size}:{count}" for size, count in loads if count)
    products = f"{found.count('HGMMA'):5}  {found.count('HMMA'):3}"
    taken = f"{found.warps:5}  {found.registers:4}  {found.spill_bytes:5}  {found.shared_bytes / 1024:9.1f}"
    return f"{taken}  {found.programs_per_sm:6}  {products}  {sum(found.instructions.values()):12}  {by_width}"


if __name__ == "__main__":
    exit_cleanly(main)
