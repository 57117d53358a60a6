from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rae_fast.evaluation.images import save_npz

TINY = "tiny_features:TinyNetwork"


@pytest.fixture
def tiny_features(monkeypatch: pytest.MonkeyPatch) -> str:
    """`module:attribute` of a tiny extractor, importable for the test."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    sys.modules.pop("tiny_features", None)
    return TINY


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., str]:
    """`pack(name, n, seed)`: an .npz of n blotchy images; its path."""

    def make(name: str, n: int, seed: int, size: int = 16) -> str:
        coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        save_npz(tmp_path / name, coarse.repeat(size // 4, 1).repeat(size // 4, 2))
        return str(tmp_path / name)

    return make
