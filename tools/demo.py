"""The whole job end to end on this machine: JPEG files become a latent store, two trained models, and new images."""

from __future__ import annotations

from pathlib import Path

from rae_fast.command_line import tool_parser
from rae_fast.errors import exit_cleanly


def main() -> None:
    """Parse the command line and run the demo."""
    parser = tool_parser(__doc__, "python tools/demo.py --data ~/photos", config=False)
    parser.add_argument("--data", type=Path, help="ImageFolder to use instead of drawing one")
    parser.add_argument("--folder", type=Path, help="where everything goes (runs/demo or runs/demo-<data>)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of configs/demo*.yaml to change")
    args = parser.parse_intermixed_args()

    from rae_fast.demo.pipeline import Demo, run_demo  # after parsing: it takes seconds to import

    name = f"demo-{args.data.resolve().name}" if args.data else "demo"
    folder = args.folder or Path("runs") / name
    metrics = run_demo(Demo(folder, args.data, tuple(args.overrides)))
    for name in ("psnr_db", "ssim", "frechet", "class_agreement", "class_agreement_real", "failures"):
        print(f"{name}: {metrics[name]}")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    exit_cleanly(main)
