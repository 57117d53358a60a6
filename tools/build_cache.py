"""Encode every image once: images -> decode and crop -> frozen encoder -> normalized latents in a zarr store.

Run it again to go on after an interruption, with any number of ranks. Under a launcher every rank takes its share:
torchrun --nproc-per-node 8 tools/build_cache.py --config <file>.
"""

from __future__ import annotations

import sys

from rae_fast.command_line import add_dry_run, parse_tool, tool_parser
from rae_fast.errors import exit_cleanly
from rae_fast.latents.writer import Stopped, build_caches
from rae_fast.progress import clock
from rae_fast.runtime import ranks_from_environment

TERMINATED = 128 + 15  # the shell's status of a process that SIGTERM ended: the store is not complete yet
EXAMPLE = "python tools/build_cache.py --config configs/demo.yaml data.source=photos cache.path=photos.zarr"


def main() -> int:
    """Build the stores of a config."""
    parser = tool_parser(str(__doc__), EXAMPLE)
    add_dry_run(parser)
    config, args = parse_tool(parser)
    if args.dry_run:
        from rae_fast.planner.page import planned

        print(planned(config))
        return 0
    ranks = ranks_from_environment()
    try:
        reports = build_caches(config, ranks)
    except Stopped:
        print("stopped; finished shards are kept, the same command goes on from here", file=sys.stderr)
        return TERMINATED
    for report in reports if ranks.is_main else ():
        print(
            f"{report.url}: complete, {report.images:,} images, {report.failures:,} failures, "
            f"{report.encoded:,} encoded in {clock(report.seconds)}, limited by {report.limits}"
        )
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
