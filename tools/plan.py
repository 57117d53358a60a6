"""Plan a run before paying for it: bytes, hours, GB/s, GPU memory, images/s, and whether a latent cache pays.

Without --gpu this machine is measured (under a minute); with --gpu and --count the figures follow from a table of data
sheets, for a machine that you do not have yet.
"""

from __future__ import annotations

import json

from rae_fast.command_line import parse_tool, tool_parser
from rae_fast.errors import exit_cleanly

EXAMPLE = "python tools/plan.py --config configs/stage2/training/DiTDH-XL_DINOv2-B_256.yaml --gpu h200 --count 8"


def main() -> int:
    """Parse, load the config, plan."""
    parser = tool_parser(str(__doc__), EXAMPLE)
    parser.add_argument("--gpu", help="a GPU of the table: h200, h100, a100, b200, l40s, rtx4090, ...")
    parser.add_argument("--count", type=int, help="how many GPUs; default: all of this machine's, or one")
    parser.add_argument("--images", type=int, help="images of the data set; default: those of data.source")
    parser.add_argument("--cores", type=int, help="CPU cores of a node; default: 16 for each GPU of the table")
    parser.add_argument("--disk-gbs", type=float, help="GB/s of random reads of a node, if known")
    parser.add_argument("--rate", type=float, help="images/s of one GPU in training, if measured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    config, args = parse_tool(parser)

    from rae_fast.planner.page import plan_page
    from rae_fast.planner.plan import make_plan

    plan = make_plan(
        config,
        gpu=args.gpu,
        count=args.count,
        images=args.images,
        cores=args.cores,
        disk_gbs=args.disk_gbs,
        images_s=args.rate,
    )
    print(json.dumps(plan, indent=2) if args.json else plan_page(plan))
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
