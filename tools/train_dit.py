"""Train a diffusion transformer from a latent store."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rae_fast.command_line import add_dry_run, parse_tool, tool_parser
from rae_fast.errors import exit_cleanly


def main() -> int:
    """Parse, load the config, train."""
    parser = tool_parser(
        "Train a diffusion transformer from a latent store; the same command goes on where an earlier one stopped.",
        "deepspeed tools/train_dit.py --config configs/stage2/training/DiTDH-XL_DINOv2-B_256.yaml",
    )
    add_dry_run(parser)
    config, args = parse_tool(parser)
    if args.dry_run:
        from rae_fast.planner.page import planned

        print(planned(config))
        return 0

    from rae_fast.runtime import on_all_devices
    from rae_fast.training.dit_trainer import train_dit

    name = Path(args.config).stem if args.config else "dit"
    on_all_devices(config.runtime.device, partial(train_dit, config, name=name))
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
