"""Predicted bytes of a store against stores that were built."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_fast.latents.layout import BACKUP, is_head
from rae_fast.latents.store import open_store
from rae_fast.planner.store_size import StoreSize, store_size

METADATA_BYTES = 100_000  # JSON, and its copy in the backup


def predicted(path: Path) -> StoreSize:
    store = open_store(path)
    return store_size(
        store.latent_shape,
        store.n,
        codec=store.attrs["codec"],
        views=store.views,
        shard_size=store.shard_size,
        pixels=store.attrs["pixels"],
        path_bytes=len(store.paths.blob) / store.n,
    )


def on_disk(path: Path) -> tuple[int, int]:
    """Bytes of shards and scales, and of all other files."""
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    shards = sum(size for key, size in sizes.items() if not is_head(key))
    return shards, sum(sizes.values()) - shards


@pytest.mark.parametrize("name", ["pristine_store", "balanced_store"])
def test_shards_take_the_predicted_bytes_exactly(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name)
    shards, small = on_disk(path)
    assert predicted(path).shards == shards
    assert predicted(path).exact
    assert predicted(path).small < small < predicted(path).small + METADATA_BYTES
    assert (path / BACKUP).exists()


def test_compressed_shards_take_the_predicted_bytes_within_15_percent(compact_store: Path) -> None:
    shards, _ = on_disk(compact_store)
    assert not predicted(compact_store).exact
    assert predicted(compact_store).shards == pytest.approx(shards, rel=0.15)


def test_imagenet_takes_what_was_computed_by_hand() -> None:
    size = store_size((768, 16, 16), 1_281_167)
    assert size.row == 393_216
    assert size.shards == 2 * (1_281_167 * 393_216 + 626 * (2048 * 16 + 4))
    assert store_size((768, 16, 16), 1_281_167, codec="balanced").row == 196_608 + 1536
