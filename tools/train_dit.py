"""Train a diffusion transformer from a latent store."""

from __future__ import annotations

from pathlib import Path

from rae_fast.command_line import parse_tool, tool_parser
from rae_fast.errors import exit_cleanly


def main() -> int:
    """Parse, load the config, train."""
    parser = tool_parser(
        "Train a diffusion transformer from a latent store; the same command goes on where an earlier one stopped.",
        "deepspeed tools/train_dit.py --config configs/stage2/training/DiTDH-XL_DINOv2-B_256.yaml",
    )
    config, args = parse_tool(parser)

    from rae_fast.runtime import follow_supervisor, ranks_from_environment
    from rae_fast.training.dit_trainer import train_dit

    follow_supervisor()
    train_dit(config, ranks_from_environment(), name=Path(args.config).stem if args.config else "dit")
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
