"""Draw images from a trained model: PNG files, a grid, and an .npz for evaluation; on any number of ranks.

Sample i depends on the seed and i alone. The same command goes on where an interrupted one stopped; with a larger
--count it adds to what is there. Many GPUs: torchrun --nproc-per-node 8 tools/sample.py ...
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rae_fast.command_line import add_dry_run, add_run, tool_parser
from rae_fast.errors import exit_cleanly
from rae_fast.runtime import follow_supervisor, on_all_devices

EXAMPLE = (
    "python tools/sample.py --run runs/demo/dit --folder runs/samples --classes star,ring --count 16 \\\n"
    "    stage_1.params.pretrained_decoder_path=runs/demo/decoder/export/model.pt"
)


def main() -> None:
    """Parse the command line and sample."""
    args = _parser().parse_intermixed_args()
    follow_supervisor()
    from rae_fast.sampling.request import answer  # after parsing: it takes seconds to import

    on_all_devices("xla" if "runtime.device=xla" in args.overrides else "auto", partial(answer, args))


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(str(__doc__), EXAMPLE)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where images, labels, grid and sampling.json go")
    add_run(parser, "training run: its config, and its export or newest checkpoint (EMA)")
    add("--weights", type=Path, help="checkpoint, .safetensors export or checkpoints folder; same as stage_2.ckpt=")
    add("--ema", metavar="DECAY", help="which average of a run (default: the first), or online")
    add("--classes", help="numbers or names, separated by commas; taken in turn")
    add("--count", type=int, help="images in all (64, or one for each of --classes)")
    add("--per-class", type=int, help="so many of each class, one class after the other")
    add("--label-sampling", choices=("equal", "random"), help="draw classes: equally often, or at random")
    add("--seed", type=int, default=0)
    add("--guidance", type=float, metavar="SCALE", help="same as guidance.scale=")
    add("--interval", metavar="LOW,HIGH", help="times with guidance, 0 data and 1 noise")
    add("--mode", choices=("ODE", "SDE"), help="same as sampler.mode=")
    add("--method", help="euler, heun, dopri5, ...; same as sampler.params.sampling_method=")
    add("--steps", type=int, help="same as sampler.params.num_steps=")
    add("--npz", action="store_true", help="also pack all images and labels into samples.npz")
    add("--latents", choices=("npy", "zarr"), help="also keep the latents, normalized float32")
    add("--batch", type=int, default=32, help="images dealt to a rank at a time (32); rounded up to whole --rows")
    add("--rows", type=int, default=32, help="samples computed at once (32); another number rounds differently")
    add("--columns", type=int, help="of the grid")
    add("--cuda-graphs", action="store_true", help="launch each pass as one graph (GPU; with runtime.compile=true too)")
    add("--sweep", action="store_true", help="only sweep.png: a row for each of --classes, the same noise in a column")
    add("--interpolate", metavar="A,B", help="only interpolation.png: rows that lead from class A to class B")
    add("--fixed-noise", action="store_true", help="interpolate the class alone")
    add_dry_run(parser)
    return parser


if __name__ == "__main__":
    exit_cleanly(main)
