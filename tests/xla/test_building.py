"""A store that is built on an XLA device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rae_fast.config import Config
from rae_fast.latents.store import open_store
from rae_fast.latents.writer import build_cache
from rae_fast.xla.device import compilations


def test_a_store_equals_the_cpus_and_each_batch_size_compiles_once(
    device: torch.device, cache_config: Callable[..., Config], pristine_store: Path, tmp_path: Path
) -> None:
    before = compilations()
    build_cache(cache_config(tmp_path / "store", "runtime.device=xla", "cache.pixels=true"))
    # Batches of 3, the 2 that a shard of 8 ends with, and the last shard's 1; each as it is and flipped.
    assert compilations() - before <= 6
    ours, theirs = open_store(pristine_store), open_store(tmp_path / "store")
    rows = np.arange(len(ours.labels))
    assert (theirs.valid == ours.valid).all() and len(rows) == len(theirs.labels) > 0
    expected, found = ours.read(rows), theirs.read(rows)
    # What is stored is float16: the last bits may round to the other side.
    assert float((found - expected).norm() / expected.norm()) <= 1e-4
