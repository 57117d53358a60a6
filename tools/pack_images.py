"""Centre-crop the images of a folder into one .npz, the reference set of rFID: arr_0 uint8 [N, S, S, 3] and labels.

Any source that a cache can be built from will do; class folders give `labels`. An image that cannot be read is an
error: a reference set with a hole in it would change every figure measured against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rae_fast.command_line import tool_parser
from rae_fast.config import Data
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.evaluation.images import save_npz
from rae_fast.images.decode import ImagePipeline
from rae_fast.images.entries import ImageIndex
from rae_fast.images.index import build_index
from rae_fast.progress import Progress


def main() -> None:
    """Parse the command line and pack."""
    parser = tool_parser(str(__doc__), "python tools/pack_images.py imagenet/val 256 references", config=False)
    parser.add_argument("source", help="folder, tars, parquet files, or a list of path,label")
    parser.add_argument("size", nargs="?", type=int, default=256, help="side of the crops (256)")
    parser.add_argument("out", nargs="?", type=Path, help="a .npz, or the folder for <source>-<size>.npz (here)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    args = parser.parse_args()
    if args.size < 1:
        raise UserError(f"size is {args.size}", "1 or more")
    index = build_index(Data(source=args.source))
    out = args.out or Path()
    if out.suffix != ".npz":
        out = out / f"{Path(args.source).resolve().name}-{args.size}.npz"
    labels = index.labels if index.num_classes > 1 else None
    save_npz(out, crops(index, args.size, args.threads), labels, count=len(index))
    print(f"{out}: {len(index):,} images of {args.size} x {args.size}" + ("" if labels is None else ", with labels"))


def crops(index: ImageIndex, size: int, threads: int | None) -> Iterator[np.ndarray]:
    """Batches of centre crops uint8 [B, S, S, 3], the reference's bytes.

    Raises:
        UserError: an image cannot be read.
    """
    progress = Progress(len(index), "images", "packing")
    for batch in ImagePipeline(index, None, size, threads=threads):
        if batch.failures:
            _, path, reason = batch.failures[0]
            raise UserError(f"{index.source}/{path}: {reason}", "an image", "mend or remove it")
        yield batch.images_B3SS.permute(0, 2, 3, 1).contiguous().numpy()
        progress.advance(len(batch.positions_B))
    progress.close()


if __name__ == "__main__":
    exit_cleanly(main)
