"""tools/pack_images.py, run as people run it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def pack(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "pack_images.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_class_folders_become_the_reference_s_crops_with_labels(
    write_files: Callable, photo: Callable, encode: Callable, reference_crop: Callable, tmp_path: Path
) -> None:
    files = {f"{name}/{i}.jpg": encode(photo(50 + i, 70 - i, i)) for i, name in enumerate("abab")}
    folder = write_files(files)
    done = pack(folder, 32, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "data-32.npz: 4 images of 32 x 32, with labels\n"
    packed = np.load(tmp_path / "data-32.npz")
    expected = np.stack([reference_crop(files[name], 32).transpose(1, 2, 0) for name in sorted(files)])
    assert np.array_equal(packed["arr_0"], expected)
    assert packed["labels"].tolist() == [0, 0, 1, 1]


def test_a_bad_image_ends_it_and_leaves_no_file(write_files: Callable, encode: Callable, tmp_path: Path) -> None:
    folder = write_files({"0.jpg": encode(np.zeros((40, 40, 3), np.uint8)), "1.jpg": b"no image"})
    done = pack(folder, 32, tmp_path / "out.npz", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {folder}/1.jpg: cannot identify image file; expected an image; mend or remove it"
    )
    assert not list(tmp_path.glob("*.npz"))
