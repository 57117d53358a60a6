"""Weights, checkpoints and statistics of bytetriper/RAE and of diffusers to ours and back.

The ending of OUT decides the format: .safetensors, or a .pt as the reference reads it. Checkpoints may be released
files, training checkpoints of either stage, or folders checkpoints/step-* of our runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_fast.command_line import tool_parser
from rae_fast.errors import exit_cleanly
from rae_fast.interop import archive, hub, official

EXAMPLE = "python tools/convert.py dit ep-0000001.pt stage2_model.safetensors --weights ema --dtype bf16"


def main() -> int:
    """Run one conversion."""
    args = _parser().parse_args()
    print(args.run(args))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(str(__doc__), EXAMPLE, config=False)
    kinds = parser.add_subparsers(required=True, metavar="KIND", title="kinds")
    for name, run, text in (
        ("dit", _dit, "the weights of a diffusion transformer, bare; IN may be a run folder, also while it runs"),
        ("decoder", _decoder, "the decoder of a stage-1 checkpoint, bare"),
        ("statistics", _statistics, "latent statistics: stat.pt or .safetensors"),
        ("pack", _pack, "a whole .pt checkpoint, optimizer and all, as one .safetensors"),
        ("unpack", _unpack, "what pack wrote, as the .pt it was"),
        ("run", _run, "a checkpoint of our DiT training as the reference's ep-*.pt, optimizer and all"),
        ("from-diffusers", _from_diffusers, "an AutoencoderRAE folder as encoder, decoder, stat.pt and stage_1.yaml"),
    ):
        kind = kinds.add_parser(name, help=text, description=text)
        kind.add_argument("source", metavar="IN", type=Path)
        kind.add_argument("target", metavar="OUT", type=Path)
        kind.set_defaults(run=run)
        if name in ("dit", "decoder"):
            kind.add_argument("--weights", choices=official.WEIGHTS, default="ema", help="of a training checkpoint")
            kind.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as it is")
        if name == "dit":
            kind.add_argument("--ema", help="of our run: a decay it kept, power_<sigma_rel> of any width, or online")
            kind.add_argument("--config", type=Path, help="YAML whose stage_2 the weights must fit")
    kind = kinds.add_parser("to-diffusers", help="the autoencoder of a config as an AutoencoderRAE folder")
    kind.add_argument("--config", type=Path, required=True, help="YAML with stage_1")
    kind.add_argument("target", metavar="OUT", type=Path)
    kind.add_argument(
        "--drop-positions", action="store_true", help="even if diffusers, with its fixed positions, decodes differently"
    )
    kind.set_defaults(run=_to_diffusers)
    kind = kinds.add_parser("fetch", help=f"released files of {hub.COLLECTION}, all of one revision")
    kind.add_argument("files", nargs="+", metavar="FILE", help="as stats/dinov2/wReg_base/imagenet1k/stat.pt")
    kind.add_argument("--to", type=Path, default=Path("models"), help="folder (models, as official configs say)")
    kind.add_argument("--revision", help="commit to take; default: the folder's, else the newest")
    kind.set_defaults(run=_fetch)
    return parser


def _dit(args: argparse.Namespace) -> str:
    if args.source.is_dir():
        from rae_fast.training.export import export_checkpoint

        ema = "online" if args.weights == "model" else args.ema
        count = export_checkpoint(args.source, args.target, ema=ema, dtype=args.dtype)
        return f"{args.target}: {count} tensors"
    if args.config is not None:
        official.check_dit(args.source, args.config, args.weights)
    count = official.convert_dit(args.source, args.target, args.weights, args.dtype)
    return f"{args.target}: {count} tensors"


def _decoder(args: argparse.Namespace) -> str:
    count = official.convert_decoder(args.source, args.target, args.weights, args.dtype)
    return f"{args.target}: {count} tensors"


def _statistics(args: argparse.Namespace) -> str:
    return f"{args.target}: statistics of latents {list(official.convert_statistics(args.source, args.target))}"


def _pack(args: argparse.Namespace) -> str:
    return f"{args.target}: {archive.pack(args.source, args.target)} tensors"


def _unpack(args: argparse.Namespace) -> str:
    return f"{args.target}: {archive.unpack(args.source, args.target)} tensors"


def _run(args: argparse.Namespace) -> str:
    from rae_fast.interop.training_state import convert_run_checkpoint

    return f"{args.target}: step {convert_run_checkpoint(args.source, args.target)}"


def _from_diffusers(args: argparse.Namespace) -> str:
    from rae_fast.interop.diffusers import import_diffusers

    return f"{import_diffusers(args.source, args.target)}: the section stage_1"


def _to_diffusers(args: argparse.Namespace) -> str:
    from rae_fast.autoencoder.rae import build_rae
    from rae_fast.config_file import load_config
    from rae_fast.interop.diffusers import export_diffusers

    export_diffusers(build_rae(load_config(args.config).stage_1), args.target, drop_positions=args.drop_positions)
    return f"{args.target}: for diffusers.AutoencoderRAE.from_pretrained"


def _fetch(args: argparse.Namespace) -> str:
    return "\n".join(str(hub.fetch(file, args.to, args.revision)) for file in args.files)


if __name__ == "__main__":
    exit_cleanly(main)
