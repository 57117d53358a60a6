"""Encode images and decode them again: pairs of PNG files, figures of each image, and .npz for evaluation.

Images are cropped as the models were trained: the reference's centre crop. The same command goes on where an
interrupted one stopped. Many GPUs: torchrun --nproc-per-node 8 tools/reconstruct.py ...
"""

from __future__ import annotations

from pathlib import Path

from rae_fast.command_line import add_run, tool_parser
from rae_fast.errors import exit_cleanly
from rae_fast.runtime import follow_supervisor, ranks_from_environment

EXAMPLE = "python tools/reconstruct.py --run runs/demo/decoder --folder runs/pairs --input runs/demo/data/val"


def main() -> None:
    """Parse the command line and reconstruct."""
    parser = tool_parser(str(__doc__), EXAMPLE)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="IMAGES", help="images, or one folder, list, tars, parquet files")
    add("--folder", type=Path, required=True, help="where pairs and figures go")
    add_run(parser, "run of train_decoder: its config and its exported decoder")
    add("--npz", action="store_true", help="also pack originals.npz and reconstructions.npz")
    add("--limit", type=int, help="only the first images")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    add("--rows", type=int, default=32, help="images computed at once (32); another number rounds differently")
    args = parser.parse_intermixed_args()
    follow_supervisor()
    # After parsing: it takes seconds to import.
    from rae_fast.sampling.reconstruct import ReconstructionJob, run_reconstruction
    from rae_fast.sampling.source import open_decoder_source

    config = open_decoder_source(args.config, args.run, args.overrides)
    job = ReconstructionJob(tuple(args.input), args.folder, args.npz, args.precision, args.limit, args.rows)
    metrics = run_reconstruction(config, job, ranks_from_environment())
    if metrics is not None:
        figures = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        print("  ".join(f"{key} {value:.4g}" for key, value in figures.items()), f" -> {args.folder}")


if __name__ == "__main__":
    exit_cleanly(main)
