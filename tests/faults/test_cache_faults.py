"""What can go wrong around a build: every case ends in a clear message or a failure record, and nothing is lost."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.images.index import ImageIndex, build_index
from rae_fast.latents import lock, sources
from rae_fast.latents.layout import WORK
from rae_fast.latents.store import open_store
from rae_fast.latents.writer import build_cache

sys.path.insert(0, str(Path(__file__).parent))

from cache_harness import finish, start_ranks

Configs = Callable[..., Config]
Files = Callable[[Path], dict[str, Any]]


@pytest.mark.parametrize("at", [30, 41, 55])
def test_sigterm_drops_the_shard_in_hand_and_the_rest_is_kept(
    cache_config: Configs, tmp_path: Path, pristine_store: Path, files_of: Files, at: int
) -> None:
    config = cache_config(tmp_path / "store", "cache.pixels=true")
    assert finish(start_ranks(config, 1, die_at=at, by=signal.SIGTERM)) == [143]
    assert not list((tmp_path / "store").rglob("*.part"))
    assert len(list((tmp_path / "store" / WORK).rglob("*.*"))) > 0
    build_cache(config)
    assert files_of(tmp_path / "store") == files_of(pristine_store)


def test_second_builder_stops_with_a_message(cache_config: Configs, tmp_path: Path) -> None:
    held = tmp_path / "store" / lock.LOCK
    held.parent.mkdir(parents=True)
    with held.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="another builder is at work"):
            build_cache(cache_config(tmp_path / "store"))
    assert build_cache(cache_config(tmp_path / "store")).images == 41


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_said_and_the_build_goes_on_when_there_is_room(
    cache_config: Configs, small_disk: Path, pristine_store: Path, files_of: Files
) -> None:
    config = cache_config(small_disk / "store", "cache.pixels=true")
    with pytest.raises(UserError, match=r"cannot write .*No space left.*finished shards are kept"):
        build_cache(config)
    assert not list(small_disk.rglob("*.part"))
    kept = list((small_disk / "store" / WORK).rglob("*.npz"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert kept
    build_cache(config)
    assert files_of(small_disk / "store") == files_of(pristine_store)


def test_target_that_cannot_be_written_is_said(cache_config: Configs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file"):
        build_cache(cache_config(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write /proc/store"):
        build_cache(cache_config("/proc/store"))


def test_folder_of_something_else_is_left_alone(cache_config: Configs, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("sun")
    with pytest.raises(UserError, match=r"not empty \(holiday.txt\)"):
        build_cache(cache_config(tmp_path / "photos"))
    assert [file.name for file in (tmp_path / "photos").iterdir()] == ["holiday.txt"]


def test_image_that_vanishes_during_the_build_becomes_a_failure(
    cache_config: Configs, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(image_folder, tmp_path / "images"))

    def index_then_lose(data: Any) -> ImageIndex:
        index = build_index(data)
        (source / index.paths[3]).unlink()
        return index

    monkeypatch.setattr(sources, "build_index", index_then_lose)
    report = build_cache(cache_config(tmp_path / "store", f"data.source={source}"))
    assert report.failures == 2
    store = open_store(tmp_path / "store")
    assert [failure["index"] for failure in store.failures] == [3, store.paths[:].index("square/013.jpg")]
    assert "No such file" in store.failures[0]["reason"]
    assert not store.valid[3]


def test_odd_files_are_encoded_or_recorded_and_never_stop_the_build(cache_config: Configs, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    image.save(folder / "a_plain.jpg")
    image.convert("CMYK").save(folder / "b_cmyk.jpg")
    image.convert("L").save(folder / "c_gray.jpg")
    image.save(folder / "d_gif.jpg", format="GIF")
    image.save(folder / "e_png.jpg", format="PNG")
    image.resize((1, 1)).save(folder / "f_dot.jpg")
    (folder / "g_empty.jpg").write_bytes(b"")
    (folder / "h_html.jpg").write_text("<html>404</html>")
    (folder / "i_noise.jpg").write_bytes(os.urandom(5000))
    (folder / "j_cut.jpg").write_bytes((folder / "a_plain.jpg").read_bytes()[:700])
    build_cache(cache_config(tmp_path / "store", f"data.source={folder}"))
    store = open_store(tmp_path / "store")
    assert [failure["path"][0] for failure in store.failures] == ["g", "h", "i", "j"]
    assert all(failure["reason"] for failure in store.failures)
    assert store.valid.tolist() == [True] * 6 + [False] * 4
    assert np.isfinite(store.read(range(10)).numpy()).all()


def test_store_of_another_version_encoder_or_setting_is_refused_by_name(
    cache_config: Configs, store_copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r'codec is "lossless"; expected "balanced"'):
        build_cache(cache_config(store_copy, "cache.pixels=true", "cache.codec=balanced"))
    with pytest.raises(UserError, match=r"pixels is 32; expected null"):
        build_cache(cache_config(store_copy))
    with pytest.raises(UserError, match=r"encoder.layers is \[1\]; expected \[0\]"):
        build_cache(cache_config(store_copy, "cache.pixels=true", "stage_1.params.encoder_params.layers=[0]"))
    root = store_copy / "zarr.json"
    content = json.loads(root.read_text())
    content["attributes"]["format_version"] = 99
    root.write_text(json.dumps(content))
    with pytest.raises(UserError, match="format_version 99"):
        build_cache(cache_config(store_copy))
    with pytest.raises(UserError, match="format_version 99"):
        open_store(store_copy)


def test_incomplete_store_is_refused_with_the_way_on(cache_config: Configs, tmp_path: Path) -> None:
    config = cache_config(tmp_path / "store")
    assert finish(start_ranks(config, 1, die_at=45)) == [-9]
    with pytest.raises(UserError, match=r"is incomplete.*tools/build_cache.py"):
        open_store(tmp_path / "store")
    half = open_store(tmp_path / "store", allow_incomplete=True)
    assert len(half.paths) == half.n == 41
    assert not half.complete
