"""The one face of all tools: `--config file.yaml key=value ...`, an example in `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.runtime import follow_supervisor


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as every other bad input: one line, exit status 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{self.prog}: {message}", mend=f"see {self.prog} --help")

    def parse_intermixed_args(self, *given: Any) -> argparse.Namespace:  # type: ignore[override]
        args = super().parse_intermixed_args(*given)
        if getattr(args, "device", None):
            args.overrides = [*args.overrides, f"runtime.device={args.device}"]
        return args


def tool_parser(description: str, example: str, *, config: bool = True) -> argparse.ArgumentParser:
    """A parser with `--config` and `key=value` overrides (unless `config` is False) and an example in its help."""
    parser = _Parser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file; official files of bytetriper/RAE work unchanged"
        )
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as training.max_steps=100")
        parser.add_argument("--device", help="auto, cpu, cuda or xla; same as runtime.device=")
        # The deepspeed launcher hands this to every script; the environment says the same.
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """`--dry-run`, for tools that work long."""
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and stop")


def add_run(parser: argparse.ArgumentParser, text: str) -> None:
    """`--run FOLDER`, by its long name too: torchrun takes `--run` for the beginning of its own --run-path."""
    parser.add_argument("--run", "--run-folder", dest="run", metavar="RUN", type=Path, help=text)


def parse_tool(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Parse the command line of a tool that takes a config.

    Raises:
        UserError: unknown flags, or a config that `load_config` refuses.
    """
    follow_supervisor()
    args = parser.parse_intermixed_args(argv)
    return load_config(args.config, args.overrides), args
