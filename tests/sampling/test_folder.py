"""Folders of samples: what a killed run leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from rae_fast.sampling.folder import remove_stale_parts


def test_parts_of_a_run_that_was_killed_just_before_are_removed(tmp_path: Path) -> None:
    started_s = psutil.Process().create_time()
    ages = {".000000.png.a.part": started_s + 0.9, ".000001.png.b.part": time.time() + 1, "000002.png": started_s - 9}
    for name, at_s in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (at_s, at_s))
    remove_stale_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".000001.png.b.part", "000002.png"}
