from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.latents.store import open_store
from rae_fast.latents.verify import verify
from rae_fast.latents.writer import build_cache

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from cache_harness import finish, start_ranks

Configs = Callable[..., Config]


@pytest.fixture
def growing(image_folder: Path, tmp_path: Path) -> Path:
    """The images without every fourth; `grow` brings them back, with a class that is new."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    away = tmp_path / "away"
    for file in sorted(folder.rglob("*.jpg"))[::4]:
        (away / file.parent.name).mkdir(parents=True, exist_ok=True)
        file.rename(away / file.parent.name / file.name)
    return folder


def grow(folder: Path) -> None:
    shutil.copytree(folder.parent / "away", folder, dirs_exist_ok=True)
    (folder / "ball").mkdir()
    shutil.copy(min(folder.glob("circle/*.jpg")), folder / "ball" / "new.jpg")


@pytest.mark.parametrize("codec", ["lossless", "balanced", "compact"])
def test_new_images_go_to_the_end_and_old_rows_stay_as_they_are(
    cache_config: Configs, growing: Path, tmp_path: Path, codec: str
) -> None:
    path = tmp_path / "store"
    config = cache_config(path, f"data.source={growing}", f"cache.codec={codec}", "cache.pixels=true")
    first = build_cache(config)
    old = open_store(path)
    rows = np.arange(old.n)
    before = {view: old.read(rows, view) for view in (*old.views, "pixels")}
    names = [(old.paths[row], old.class_names[old.labels[row]]) for row in rows]
    full_shard = (path / "latents/original/c/0/0/0/0").stat()
    mean = old.mean
    grow(growing)
    report = build_cache(config)
    store = open_store(path)
    assert (report.images, first.images) == (42, 30)
    assert report.encoded == 12 + 30 % 8
    assert (path / "latents/original/c/0/0/0/0").stat().st_mtime_ns == full_shard.st_mtime_ns
    assert [(store.paths[row], store.class_names[store.labels[row]]) for row in rows] == names
    assert {view: torch.equal(store.read(rows, view), tensor) for view, tensor in before.items()} == {
        "original": True,
        "hflip": True,
        "pixels": True,
    }
    assert store.class_names == ("circle", "square", "triangle", "ball")
    new = store.paths[:].index("ball/new.jpg")
    twin = store.paths[:].index(min(p for p in store.paths if p.startswith("circle")))
    assert store.class_names[store.labels[new]] == "ball"
    assert torch.allclose(store.read([new]), store.read([twin]), atol=1e-3)
    assert torch.equal(store.mean, mean)
    assert store.attrs["valid_images"] == int(store.valid.sum()) == 42 - len(store.failures)
    assert [failure["path"] for failure in store.failures] == ["square/013.jpg"]
    assert [segment["images"] for segment in store.attrs["dataset"]["segments"]] == [30, 12]
    assert verify(str(path)).damages == []
    assert build_cache(config).encoded == 0


def test_append_killed_again_and_again_ends_like_one_that_was_not(
    cache_config: Configs, growing: Path, tmp_path: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    config = cache_config(tmp_path / "store", f"data.source={growing}")
    build_cache(config)
    shutil.copytree(tmp_path / "store", tmp_path / "undisturbed")
    grow(growing)
    build_cache(cache_config(tmp_path / "undisturbed", f"data.source={growing}"))
    lives, codes = 0, [-9]
    while codes == [-9]:
        codes = finish(start_ranks(config, 1, die_at=1 + 6 * lives))
        lives += 1
    assert codes == [0]
    assert lives > 4
    assert files_of(tmp_path / "store") == files_of(tmp_path / "undisturbed")


def test_source_that_lost_images_is_refused(cache_config: Configs, growing: Path, tmp_path: Path) -> None:
    config = cache_config(tmp_path / "store", f"data.source={growing}")
    build_cache(config)
    gone = open_store(tmp_path / "store").paths[20]
    grow(growing)
    (growing / gone).unlink()
    with pytest.raises(UserError, match=rf"1 images that .* lacks, first {gone}"):
        build_cache(config)
    assert open_store(tmp_path / "store").n == 30


def test_images_that_changed_are_refused(cache_config: Configs, growing: Path, tmp_path: Path) -> None:
    config = cache_config(tmp_path / "store", f"data.source={growing}")
    build_cache(config)
    files = sorted(growing.glob("circle/*.jpg"))
    shutil.copy(files[0], files[1])
    with pytest.raises(UserError, match="other sizes or labels"):
        build_cache(config)


def test_second_encoder_is_cached_from_kept_pixels(
    cache_config: Configs, pristine_store: Path, tmp_path: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    """The same encoder gives the same shards as from JPEGs; other layers give a store of their own."""
    direct = files_of(pristine_store)
    build_cache(cache_config(tmp_path / "same", f"cache.pixels_from={pristine_store}", "data.source=/gone"))
    shards = [key for key in direct if key.startswith(("latents/", "stats/", "labels/", "valid/", "failures"))]
    again = files_of(tmp_path / "same")
    assert all(again[key] == direct[key] for key in shards)
    layers = "stage_1.params.encoder_params.layers=[0]"
    build_cache(cache_config(tmp_path / "other", f"cache.pixels_from={pristine_store}", layers))
    assert open_store(tmp_path / "other").attrs["encoder"]["layers"] == [0]
    with pytest.raises(UserError, match="was built without pixels"):
        build_cache(cache_config(tmp_path / "third", f"cache.pixels_from={tmp_path / 'same'}"))
