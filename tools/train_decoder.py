"""Train a decoder of latents to pixels."""

from __future__ import annotations

from pathlib import Path

from rae_fast.command_line import add_dry_run, parse_tool, tool_parser
from rae_fast.errors import exit_cleanly


def main() -> int:
    """Parse, load the config, train."""
    parser = tool_parser(
        "Train a decoder of latents to pixels, on cached latents or online; the same command goes on where an earlier "
        "one stopped.",
        "deepspeed tools/train_decoder.py --config configs/stage1/training/DINOv2-B_decXL.yaml cache.path=<store>",
    )
    add_dry_run(parser)
    config, args = parse_tool(parser)
    if args.dry_run:
        from rae_fast.planner.decoder_page import planned_decoder

        print(planned_decoder(config))
        return 0

    from rae_fast.autoencoder.trainer import train_decoder
    from rae_fast.runtime import ranks_from_environment

    train_decoder(config, ranks_from_environment(), name=Path(args.config).stem if args.config else "decoder")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
