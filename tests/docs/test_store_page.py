from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rae_fast.latents.store import open_store

PAGE = Path(__file__).resolve().parents[2] / "docs/store.md"


@pytest.fixture(scope="module")
def read_latent() -> Callable[..., np.ndarray]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    space: dict[str, object] = {}
    exec(code, space)
    return space["read_latent"]


@pytest.mark.parametrize("fixture", ["pristine_store", "balanced_store", "compact_store"])
def test_the_pages_reader_reads_what_ours_reads(
    read_latent: Callable[..., np.ndarray], fixture: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    store = open_store(path)
    for view in store.views:
        for i in (0, 7, 8, 40):
            expected = store.read([i], view)[0].numpy()
            np.testing.assert_array_equal(read_latent(path, i, view), expected)
