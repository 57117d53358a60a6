"""Look into a latent store and keep it trustworthy.

info        a page of facts; --preview FILE.png draws latents (their three strongest directions) beside their images
verify      every byte against its checksum; exit status 1 if any is wrong
repair      small files from their backup, bad shards encoded again from the source
compare     stored latents against fresh encodings; in pixels too, where the config names a decoder
statistics  mean and variance as a stat.pt, which cache.statistics takes and the reference reads
export      to LightningDiT's safetensors shards or to .npy, un-normalized
import      a store from such files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rae_fast.command_line import tool_parser
from rae_fast.config_file import load_config
from rae_fast.errors import exit_cleanly
from rae_fast.latents.facts import readable_bytes, store_facts
from rae_fast.latents.store import open_store
from rae_fast.latents.verify import verify

EXAMPLE = "python tools/inspect_cache.py verify imagenet.zarr"


def info(args: argparse.Namespace) -> int:
    """Print the page of facts; draw the preview."""
    store = open_store(args.store, allow_incomplete=True)
    facts = store_facts(store)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    print(json.dumps(facts, indent=2) if args.json else "\n".join(lines))
    if args.preview:
        from rae_fast.evaluation.images import save_grid
        from rae_fast.latents.preview import draw_preview

        pictures, columns = draw_preview(store, args.images)
        save_grid(args.preview, pictures, columns)
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


def compare_store(args: argparse.Namespace) -> int:
    """Encode afresh and compare."""
    from rae_fast.evaluation.fidelity import pixel_distances, store_decoder
    from rae_fast.latents.compare import compare
    from rae_fast.latents.plan import config_of
    from rae_fast.latents.preview import spread_rows

    store = open_store(args.store)
    config = config_of(store.attrs, args.overrides)
    decode = store_decoder(config, store)
    measures = pixel_distances(config) if decode else {}
    found = compare(store, config, spread_rows(store, args.images), decode, measures)
    print(json.dumps({"images": found.images, **found.errors, **found.distances}, indent=2))
    return 0


def write_statistics(args: argparse.Namespace) -> int:
    """Write the store's stat.pt."""
    from rae_fast.latents.stats import save_statistics

    store = open_store(args.store)
    save_statistics(args.file, store.mean, store.var)
    print(f"{args.file}: mean and var, {' x '.join(map(str, store.latent_shape))}")
    return 0


def export_store(args: argparse.Namespace) -> int:
    """Write the store in another layout."""
    from rae_fast.latents.exports import export

    count = export(open_store(args.store), Path(args.folder), args.layout, show_progress=True)
    print(f"{args.folder}: {count:,} images")
    return 0


def import_store(args: argparse.Namespace) -> int:
    """Make a store of other people's latents."""
    from rae_fast.latents.imports import import_latents

    config = load_config(args.config, [*args.overrides, f"cache.path={args.store}"])
    report = import_latents(args.folder, config, args.encoder)
    print(f"{report.url}: complete, {report.images:,} images, {report.failures:,} failures")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """One sub-command for each line of the description."""
    parser = tool_parser(str(__doc__), EXAMPLE, config=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    facts = commands.add_parser("info", help="a page of facts")
    facts.add_argument("--json", action="store_true", help="as JSON")
    facts.add_argument("--preview", metavar="FILE.png", help="draw latents beside their images")
    facts.set_defaults(run=info)
    check = commands.add_parser("verify", help="every byte against its checksum")
    check.add_argument("--threads", type=int, default=8)
    check.set_defaults(run=verify_store)
    mend = commands.add_parser("repair", help="mend what is bad")
    mend.set_defaults(run=repair_store)
    fidelity = commands.add_parser("compare", help="stored latents against fresh encodings")
    fidelity.set_defaults(run=compare_store)
    moments = commands.add_parser("statistics", help="mean and variance as a stat.pt")
    moments.set_defaults(run=write_statistics)
    out = commands.add_parser("export", help="to safetensors or .npy")
    out.set_defaults(run=export_store)
    bring = commands.add_parser("import", help="from safetensors or .npy")
    bring.add_argument("folder", help="where the files are")
    bring.add_argument("--config", metavar="FILE", help="YAML file with a cache section")
    bring.add_argument("--encoder", default="imported latents", help="what made them, for the record")
    bring.set_defaults(run=import_store)
    for command in (facts, check, mend, fidelity, moments, out, bring):
        command.add_argument("store", help="path or URL of the store")
    moments.add_argument("file", help="the stat.pt to write")
    out.add_argument("folder", help="new folder")
    out.add_argument("--layout", default="safetensors", help="safetensors (LightningDiT's) or npy")
    for command in (facts, fidelity):
        command.add_argument("--images", type=int, default=16 if command is facts else 256)
    for command in (mend, fidelity, bring):
        command.add_argument("overrides", nargs="*", metavar="key=value", help="as data.source=<where the images are>")
    return parser


def main() -> int:
    """Run one command."""
    args = make_parser().parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    exit_cleanly(main)
