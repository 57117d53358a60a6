"""What `tools/sample.py` was asked for, as a config and a job; grids are drawn here, sets of images by `job`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.evaluation.images import save_grid
from rae_fast.geometry import Geometry, resolve_geometry
from rae_fast.runtime import Ranks, pick_device, set_precision
from rae_fast.sampling.classes import LabelRequest, choose_labels, class_numbers, known_names
from rae_fast.sampling.grids import class_sweep, interpolation
from rae_fast.sampling.job import SamplingJob, check_seed, run_sampling
from rae_fast.sampling.sampler import load_sampler
from rae_fast.sampling.source import open_decoder, open_source

# Flags that are short for keys of the config.
KEYS = {
    "guidance": "guidance.scale",
    "mode": "sampler.mode",
    "method": "sampler.params.sampling_method",
    "steps": "sampler.params.num_steps",
}
SWEPT_CLASSES, SWEPT_COLUMNS = 10, 8
ROWS, COLUMNS = 4, 8


def answer(args: Namespace, ranks: Ranks) -> None:
    """As `run_request`, printed."""
    print(run_request(args, ranks), end="")


def run_request(args: Namespace, ranks: Ranks) -> str:
    """Do what the parsed command line of `tools/sample.py` says; returns what rank 0 prints.

    Raises:
        UserError: anything unusable in it.
    """
    config = open_source(args.config, args.run, args.weights, [*args.overrides, *flag_overrides(args)], args.ema)
    geometry = resolve_geometry(config)
    if args.sweep or args.interpolate:
        # Some tens of images: one rank's work.
        return f"{draw_grid(args, config, geometry)}\n" if ranks.is_main else ""
    if args.fixed_noise:
        raise UserError("--fixed-noise without --interpolate", "--interpolate A,B")
    assert geometry.num_classes is not None
    request = LabelRequest(_words(args.classes), args.count, args.per_class, args.label_sampling)
    labels = choose_labels(request, known_names(config, geometry.num_classes), geometry.num_classes, args.seed)
    job = SamplingJob(
        args.folder,
        labels,
        seed=args.seed,
        npz=args.npz,
        latents=args.latents,
        batch=args.batch,
        rows=args.rows,
        columns=args.columns or args.per_class,
        cuda_graphs=args.cuda_graphs,
        ema=args.ema,
    )
    if args.dry_run:
        there = len(list((args.folder / "images").glob("*.png")))
        return f"{len(labels)} images of {len(set(labels.tolist()))} classes in {args.folder}, {there} there already\n"
    run_sampling(config, job, ranks)
    if not ranks.is_main:
        return ""
    made = [args.folder / "images", args.folder / "grid.png"]
    made += [args.folder / "samples.npz"] if args.npz else []
    made += [args.folder / f"latents.{args.latents}"] if args.latents else []
    return f"{len(labels)} images: {', '.join(map(str, made))}\n"


def flag_overrides(args: Namespace) -> list[str]:
    """The config keys that flags stand for.

    Raises:
        UserError: an interval that is not two numbers.
    """
    overrides = [f"{key}={getattr(args, flag)}" for flag, key in KEYS.items() if getattr(args, flag) is not None]
    if args.interval is not None:
        try:
            low, high = (float(bound) for bound in args.interval.split(","))
        except ValueError as error:
            raise UserError(f"--interval {args.interval}", "two numbers, as --interval 0.1,0.9") from error
        overrides += [f"guidance.t_min={low}", f"guidance.t_max={high}"]
    return overrides


def draw_grid(args: Namespace, config: Config, geometry: Geometry) -> Path:
    """Draw sweep.png or interpolation.png; returns its path.

    Raises:
        UserError: both are asked for, or unknown classes.
    """
    if args.sweep and args.interpolate:
        raise UserError("--sweep together with --interpolate", "one of the two")
    if args.label_sampling or args.npz or args.latents:
        raise UserError("--label-sampling, --npz or --latents with a grid", "images, without --sweep or --interpolate")
    check_seed(args.seed)
    assert geometry.num_classes is not None
    names = known_names(config, geometry.num_classes)
    device = pick_device(config.runtime.device)
    set_precision(config.runtime.precision)
    if args.interpolate:
        ends = class_numbers(args.interpolate.split(","), names, geometry.num_classes)
        if len(ends) != 2:
            raise UserError(f"--interpolate {args.interpolate}", "two classes, as --interpolate star,ring")
    classes = list(range(min(geometry.num_classes, SWEPT_CLASSES)))
    if args.classes:
        classes = class_numbers(args.classes.split(","), names, geometry.num_classes)
    sampler = load_sampler(config, geometry, device, rows=args.rows, ema=args.ema)
    rae = open_decoder(config, device)
    if args.interpolate:
        path, columns, rows = args.folder / "interpolation.png", args.columns or COLUMNS, args.count or ROWS
        drawn = interpolation(sampler, rae, (ends[0], ends[1]), columns, rows, args.seed, fixed_noise=args.fixed_noise)
    else:
        path, columns = args.folder / "sweep.png", args.columns or SWEPT_COLUMNS
        drawn = class_sweep(sampler, rae, classes, columns, args.seed)
    save_grid(path, drawn, columns)
    return path


def _words(text: str | None) -> tuple[str, ...] | None:
    return tuple(text.split(",")) if text else None
