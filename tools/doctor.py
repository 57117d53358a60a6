"""What this machine can run, and why a run's samples are noise.

machine  (or nothing) each part of the machine: ok, missing or slow, what it costs, how to mend it
run      a training run from its store to its weights: what is off, in the order in which data flows

Exit status 0: all that --need names can run here, or nothing is wrong with the run; 1: not so; 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rae_fast.doctor import machine
from rae_fast.errors import exit_cleanly

EXAMPLE = "python tools/doctor.py\n  python tools/doctor.py run runs/dit --config sample.yaml"


def examine_machine(args: argparse.Namespace) -> int:
    """Try everything; judge what is needed."""
    needed = args.need.split(",")
    machine.check_jobs(needed)
    trials = machine.examine_machine(args.folder)
    print(machine.tell(trials))
    return int(not all(machine.can_run(trials, job) for job in needed))


def examine_run(args: argparse.Namespace) -> int:
    """Look at a run."""
    from rae_fast.doctor.findings import WRONG, tell
    from rae_fast.doctor.run import examine_run

    findings = examine_run(args.folder, args.config, args.overrides)
    print(tell(findings))
    return int(any(finding.state == WRONG for finding in findings))


def make_parser() -> argparse.ArgumentParser:
    """One sub-command for each line of the description."""
    from rae_fast.command_line import tool_parser

    parser = tool_parser(str(__doc__), EXAMPLE, config=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    here = commands.add_parser("machine", help="what can run here")
    here.add_argument("--need", default="demo,cache,train", help="what must run: some of demo,cache,train,kernels")
    here.add_argument("--folder", type=Path, default=Path(), help="where stores will be (here)")
    here.set_defaults(run=examine_machine)
    run = commands.add_parser("run", help="why samples of a run are noise")
    run.add_argument("folder", type=Path, help="the run folder")
    run.add_argument("--config", metavar="FILE", help="the YAML that samples are drawn with, if not the run's own")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the sampling")
    run.set_defaults(run=examine_run)
    return parser


def main() -> int:
    """Run one command."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments)):
        arguments = ["machine", *arguments]
    try:
        parser = make_parser()
    except ImportError as error:
        # Without torch not even the command line can be read: that is what this tool is asked about.
        print(f"rae_fast cannot be imported: {error}\n", file=sys.stderr)
        return examine_machine(argparse.Namespace(need="demo,cache,train", folder=Path()))
    args = parser.parse_args(arguments)
    return int(args.run(args))


if __name__ == "__main__":
    exit_cleanly(main)
