"""Draw images from a trained model: PNG files, a grid, and an .npz for evaluation; on any number of ranks.

Sample i depends on the seed and i alone. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rae_fast.command_line import parse_tool, tool_parser
from rae_fast.config import Config
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.geometry import resolve_geometry
from rae_fast.runtime import ranks_from_environment

EXAMPLE = "python tools/sample.py --config configs/demo.yaml --folder runs/samples --count 64 stage_2.ckpt=<file>"


def main() -> None:
    """Parse the command line and sample."""
    parser = tool_parser(str(__doc__), EXAMPLE)
    parser.add_argument("--folder", type=Path, required=True, help="where images, grid and sampling.json go")
    parser.add_argument("--count", type=int, help="number of images in all (default: 64, or one for each of --classes)")
    parser.add_argument("--classes", help="numbers or names, separated by commas; taken in turn")
    parser.add_argument(
        "--label-sampling", choices=("equal", "random"), help="draw classes: equally often, or at random"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--npz", action="store_true", help="also pack all images into samples.npz")
    config, args = parse_tool(parser)

    from rae_fast.sampling_job import SamplingJob, run_sampling  # after parsing: it takes seconds to import

    labels = _labels(config, args.classes, args.count, args.label_sampling, args.seed)
    ranks = ranks_from_environment()
    run_sampling(config, SamplingJob(args.folder, labels, args.seed, args.npz), ranks)
    if ranks.is_main:
        print(f"{len(labels)} images: {args.folder / 'images'}, grid: {args.folder / 'grid.png'}")


def _labels(config: Config, classes: str | None, count: int | None, sampling: str | None, seed: int) -> np.ndarray:
    from rae_fast.evaluation.labels import draw_labels
    from rae_fast.sampling_job import class_numbers

    num_classes = resolve_geometry(config).num_classes
    if num_classes is None:
        raise UserError("the number of classes is unknown", "misc.num_classes", "set it")
    if count is not None and count < 1:
        raise UserError(f"--count {count}", "a number above 0")
    if sampling and classes:
        raise UserError("--classes together with --label-sampling", "one of the two")
    if sampling:
        return draw_labels(sampling, count or 64, num_classes, seed)
    numbers = class_numbers(classes.split(","), _class_names(config), num_classes) if classes else range(num_classes)
    return np.resize(np.asarray(list(numbers), np.int64), count or (len(numbers) if classes else 64))


def _class_names(config: Config) -> tuple[str, ...]:
    """Names kept in the store, if there is one."""
    from rae_fast.latents.store import open_store

    if config.cache.path is None or not Path(config.cache.path).exists():
        return ()
    return open_store(config.cache.path).class_names


if __name__ == "__main__":
    exit_cleanly(main)
