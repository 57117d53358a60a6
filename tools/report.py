"""Write a self-contained HTML page about a training run: curves, sample grids, throughput, identity."""

from __future__ import annotations

from pathlib import Path

from rae_fast.command_line import tool_parser
from rae_fast.errors import exit_cleanly
from rae_fast.evaluation.run_report import write_run_report


def main() -> None:
    """Parse the command line and write the page."""
    parser = tool_parser(str(__doc__), "python tools/report.py runs/demo/dit", config=False)
    parser.add_argument("run_folder", type=Path, help="folder of a decoder or DiT training run")
    print(f"report: {write_run_report(parser.parse_args().run_folder)}")


if __name__ == "__main__":
    exit_cleanly(main)
