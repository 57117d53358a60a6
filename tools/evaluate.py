"""Measure images; on any number of ranks, and the same figures whatever their number.

generation      FID, sFID, inception score, MMD, precision and recall of samples against a reference
reconstruction  PSNR, SSIM, LPIPS and rFID of reconstructions, or of a config's decoder on held-out images

Writes report.json, report.html and pictures into --out. Features are kept in --cache: an interrupted evaluation goes
on where it stopped, and the next one against the same reference need not look at it again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rae_fast.command_line import tool_parser
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import exit_cleanly
from rae_fast.runtime import follow_supervisor, ranks_from_environment

EXAMPLE = "python tools/evaluate.py generation --samples runs/samples --reference VIRTUAL_imagenet256_labeled.npz"


def generation(args: argparse.Namespace) -> int:
    """Compare samples with a reference."""
    from rae_fast.evaluation.generation import GenerationJob, evaluate_generation

    job = GenerationJob(
        args.samples,
        args.reference,
        tuple(args.features.split(",")),
        args.out,
        args.cache,
        args.image_size,
        args.inception_weights,
        args.token,
    )
    return show(evaluate_generation(job, config_of(args), ranks_from_environment()), args.out)


def reconstruction(args: argparse.Namespace) -> int:
    """Compare reconstructions with their originals."""
    from rae_fast.evaluation.pairs import ReconstructionJob, evaluate_reconstruction

    job = ReconstructionJob(
        args.originals,
        args.restored,
        tuple(args.metrics.split(",")),
        args.out,
        args.cache,
        args.features,
        args.image_size,
        args.inception_weights,
    )
    return show(evaluate_reconstruction(job, config_of(args), ranks_from_environment()), args.out)


def config_of(args: argparse.Namespace) -> Config | None:
    """The config, if the command line names one or sets a key."""
    return load_config(args.config, args.overrides) if args.config or args.overrides else None


def show(report: dict | None, out: Path) -> int:
    """Print the figures, on the rank that has them."""
    if report is not None:
        for evaluator, figures in report["metrics"].items():
            for name, value in figures.items():
                print(f"{evaluator}  {name}  {value:.6g}")
        print(f"{out / 'report.json'}, {out / 'report.html'}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """One sub-command for each line of the description."""
    parser = tool_parser(str(__doc__), EXAMPLE, config=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    made = commands.add_parser("generation", help="samples against a reference")
    made.add_argument("--samples", required=True, help=".npz with arr_0, folder of images, or folder of sample.py")
    made.add_argument("--reference", required=True, help="ADM's .npz, .npz of images, folder, or latent store")
    made.add_argument(
        "--features", default="inception", help="inception, encoder, my_module:function; several with commas"
    )
    made.add_argument("--token", choices=("mean", "cls"), default="mean", help="the encoder's feature of an image")
    made.set_defaults(run=generation)
    again = commands.add_parser("reconstruction", help="reconstructions against originals")
    again.add_argument("--originals", required=True, help=".npz, folder, or latent store with pixels")
    again.add_argument("--restored", help=".npz or folder; without it the config's decoder makes them")
    again.add_argument("--metrics", default="psnr,ssim,lpips,rfid", help="some of psnr,ssim,lpips,rfid")
    again.add_argument("--features", default="inception", help="network of rFID: inception or my_module:function")
    again.set_defaults(run=reconstruction)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rae_fast" / "evaluation"
    for command in (made, again):
        command.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder of the report")
        command.add_argument("--cache", type=Path, default=cache, help=f"folder of features ({cache})")
        command.add_argument("--image-size", type=int, help="crop the images of a folder of real ones to this side")
        command.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's file, if not in its place")
        command.add_argument("--config", metavar="FILE", help="YAML file that names encoder and decoder")
        command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the config")
    return parser


def main() -> int:
    """Run one command."""
    follow_supervisor()
    args = make_parser().parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    exit_cleanly(main)
