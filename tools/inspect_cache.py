"""Look into a latent store and keep it trustworthy.

info     a page of facts; --preview FILE.png draws latents beside their images
verify   every byte against its checksum; exit status 1 if any is wrong
repair   small files from their backup, bad shards encoded again from the source
"""

from __future__ import annotations

import argparse
import json
import sys

from rae_fast.command_line import tool_parser
from rae_fast.errors import exit_cleanly
from rae_fast.latents.facts import readable_bytes, store_facts
from rae_fast.latents.store import open_store
from rae_fast.latents.verify import verify

EXAMPLE = "python tools/inspect_cache.py verify imagenet.zarr"


def info(args: argparse.Namespace) -> int:
    """Print the page of facts."""
    facts = store_facts(open_store(args.store, allow_incomplete=True))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items()))
    return 0


def verify_store(args: argparse.Namespace) -> int:
    """Check every byte."""
    report = verify(args.store, threads=args.threads, show_progress=True)
    for damage in report.damages:
        print(f"damaged: {damage}")
    for stray in report.strays:
        print(f"not part of the store: {stray}")
    state = f"{len(report.damages)} damaged" if report.damages else "all as written"
    print(f"{args.store}: {report.files:,} files, {readable_bytes(report.size_bytes)}, {state}")
    if report.damages:
        print(f"run: python tools/inspect_cache.py repair {args.store}", file=sys.stderr)
    return 1 if report.damages else 0


def repair_store(args: argparse.Namespace) -> int:
    """Mend what is bad."""
    from rae_fast.latents.plan import config_of
    from rae_fast.latents.repair import repair
    from rae_fast.latents.verify import open_intact_url

    config = config_of(open_intact_url(args.store).attrs, args.overrides)
    report = repair(args.store, config, show_progress=True)
    for key in report.restored:
        print(f"restored {key}")
    for shard in report.shards:
        changed = " (other bytes than before: checksums written anew)" if shard in report.changed else ""
        print(f"encoded shard {shard} again{changed}")
    print(f"{args.store}: {len(report.restored)} files restored, {len(report.shards)} shards encoded again")
    return 0


def main() -> int:
    """Run one command."""
    parser = tool_parser(str(__doc__), EXAMPLE, config=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    facts = commands.add_parser("info", help="a page of facts")
    facts.add_argument("--json", action="store_true", help="as JSON")
    facts.set_defaults(run=info)
    check = commands.add_parser("verify", help="every byte against its checksum")
    check.add_argument("--threads", type=int, default=8)
    check.set_defaults(run=verify_store)
    mend = commands.add_parser("repair", help="mend what is bad")
    mend.set_defaults(run=repair_store)
    for command in (facts, check, mend):
        command.add_argument("store", help="path or URL of the store")
    mend.add_argument("overrides", nargs="*", metavar="key=value", help="as data.source=<where the images are now>")
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    exit_cleanly(main)
