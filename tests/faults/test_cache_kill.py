"""kill -9 at any moment, then any number of ranks: the store is byte-identical to an undisturbed one."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rae_fast.config import Config

sys.path.insert(0, str(Path(__file__).parent))

from cache_harness import finish, kill, start_ranks

MANY = 10_000  # more files than a build writes


@pytest.fixture
def config(cache_config: Callable[..., Config], tmp_path: Path) -> Config:
    return cache_config(tmp_path / "store", "cache.pixels=true")


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_builds_identical_bytes(
    config: Config, world: int, pristine_store: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    assert finish(start_ranks(config, world)) == [0] * world
    assert files_of(Path(str(config.cache.path))) == files_of(pristine_store)


def test_build_killed_again_and_again_ends_with_identical_bytes(
    config: Config, pristine_store: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    """Each life puts more files in place than the one before, so that every phase is cut somewhere."""
    lives, codes = 0, [-9]
    while codes == [-9]:
        codes = finish(start_ranks(config, 1, die_at=5 + 9 * lives))
        lives += 1
    assert codes == [0]
    assert lives > 4
    assert files_of(Path(str(config.cache.path))) == files_of(pristine_store)


def test_killed_ranks_are_resumed_by_another_number_of_ranks(
    config: Config, pristine_store: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    for world, die_at in ((2, 9), (3, 8), (1, 12), (2, MANY)):
        codes = finish(start_ranks(config, world, die_at))
    assert codes == [0, 0]
    assert files_of(Path(str(config.cache.path))) == files_of(pristine_store)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_build_killed_at_each_of_its_files_resumes_to_identical_bytes(
    cache_config: Callable[..., Config],
    tmp_path: Path,
    pristine_store: Path,
    files_of: Callable[[Path], dict[str, Any]],
) -> None:
    point, codes = 0, [-9]
    while codes == [-9]:
        point += 1
        config = cache_config(tmp_path / str(point), "cache.pixels=true")
        codes = finish(start_ranks(config, 1, die_at=point))
        if codes == [-9]:
            assert finish(start_ranks(config, 1)) == [0]
        assert files_of(tmp_path / str(point)) == files_of(pristine_store), f"killed at file {point}"
    assert point > 60


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_fifty_kills_at_random_moments(
    config: Config, world: int, pristine_store: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    draw = random.Random(world)
    for attempt in range(50):
        ranks = start_ranks(config, world if attempt % 2 == 0 else draw.choice([1, 2, 3]))
        time.sleep(draw.uniform(0.05, 3.0))
        kill(ranks)
    assert finish(start_ranks(config, 3)) == [0, 0, 0]
    assert files_of(Path(str(config.cache.path))) == files_of(pristine_store)
