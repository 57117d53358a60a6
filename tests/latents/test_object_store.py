"""A store behind the S3 protocol: built, resumed, read, verified and repaired like a local one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.latents import lock
from rae_fast.latents.loader import LatentLoader
from rae_fast.latents.plan import config_of
from rae_fast.latents.reader import open_reader
from rae_fast.latents.repair import repair
from rae_fast.latents.storage import ObjectStorage, open_storage
from rae_fast.latents.store import open_store
from rae_fast.latents.verify import verify
from rae_fast.latents.writer import build_cache
from rae_fast.runtime import Ranks

Configs = Callable[..., Config]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket on an S3 server on the loopback."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem().mkdir("latents")
    yield "s3://latents"
    patch.undo()
    server.stop()


@pytest.fixture(scope="module", params=["s3", "memory"])
def url(request: pytest.FixtureRequest, cache_config: Configs) -> str:
    """A finished store on an object store; "memory" is fsspec's own, which is always there."""
    root = request.getfixturevalue("bucket") if request.param == "s3" else "memory://latents"
    url = f"{root}/deep/store"
    build_cache(cache_config(url, "cache.pixels=true"))
    return url


def objects(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {key: storage.read(key) for key in storage.list()}


def test_store_has_the_bytes_of_a_local_one(
    url: str, pristine_store: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    assert objects(url) == files_of(pristine_store)


def test_latents_are_read_back(url: str, pristine_store: Path) -> None:
    store, local = open_store(url), open_store(pristine_store)
    rows = [40, 3, 3, 17]
    assert torch.equal(store.read(rows, "hflip"), local.read(rows, "hflip"))
    assert torch.equal(store.read_pixels(rows), local.read_pixels(rows))
    loaders = [LatentLoader(opened, batch_size=10, seed=1) for opened in (store, local)]
    for _ in range(5):
        ours, theirs = (next(loader) for loader in loaders)
        assert torch.equal(ours.latents_BCHW, theirs.latents_BCHW)
    for loader in loaders:
        loader.close()


def test_zarr_libraries_read_it_too(bucket: str, cache_config: Configs, pristine_store: Path) -> None:
    url = f"{bucket}/plain"
    build_cache(cache_config(url, "cache.codec=compact"))
    store = open_store(url)
    group = zarr.open_group(url, mode="r")
    assert np.array_equal(group["labels"][:], store.labels)
    rows, which = np.array([0, 40, 9]), np.array([0, 1, 0])
    planes = [store.planes[view] for view in store.views]
    gathered = []
    for kind in ("object", "zarr", "tensorstore"):
        out = np.empty((3, *planes[0].row_shape), planes[0].dtype)
        open_reader(store, kind).gather(rows, planes, which, out, None)
        gathered.append(out)
    assert np.array_equal(gathered[0], gathered[1])
    assert np.array_equal(gathered[0], gathered[2])


def test_interrupted_build_goes_on(
    bucket: str, cache_config: Configs, pristine_store: Path, files_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/interrupted"
    write, calls = ObjectStorage.write, [0]

    def failing(self: ObjectStorage, key: str, data: bytes) -> None:
        calls[0] += key != lock.LOCK
        if calls[0] == 40:
            raise ConnectionError("the network is gone")
        write(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "write", failing)
        with pytest.raises(ConnectionError):
            build_cache(cache_config(url, "cache.pixels=true"))
    with pytest.raises(UserError, match="is incomplete"):
        open_store(url)
    build_cache(cache_config(url, "cache.pixels=true"))
    assert objects(url) == files_of(pristine_store)


def test_flipped_bit_is_refused_found_and_mended(url: str) -> None:
    before = objects(url)
    key = "latents/original/c/1/0/0/0"
    data = bytearray(before[key])
    data[5] ^= 16
    open_storage(url).write(key, bytes(data))
    with pytest.raises(UserError, match="shard 1 of latents/original: row 8"):
        open_store(url).read([8])
    assert [damage.key for damage in verify(url).damages] == [key]
    repair(url, config_of(open_store(url).attrs))
    assert objects(url) == before


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_second_builder_stops_with_a_message(
    request: pytest.FixtureRequest, cache_config: Configs, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Two builders on an object store both went on."""
    monkeypatch.setattr(lock, "BEAT_S", 1.0)
    root = request.getfixturevalue("bucket") if scheme == "s3" else "memory://latents"
    config = cache_config(f"{root}/held")
    with lock.builder_lock(open_storage(f"{root}/held"), Ranks(), lambda: None):
        with pytest.raises(UserError, match="another builder is at work"):
            build_cache(config)
        assert lock.LOCK in objects(f"{root}/held")
    assert lock.LOCK not in objects(f"{root}/held")
    assert build_cache(config).images == 41
    assert lock.LOCK not in objects(f"{root}/held")


def test_lock_of_a_builder_that_died_holds_nobody_up(
    cache_config: Configs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    url = "memory://latents/left"
    open_storage(url).write(lock.LOCK, b"a value that nobody changes")
    assert build_cache(cache_config(url)).images == 41
    assert "a builder left its lock" in capsys.readouterr().out
    assert lock.LOCK not in objects(url)


def test_missing_store_and_unknown_scheme_are_said(url: str) -> None:
    with pytest.raises(UserError, match="no latent store"):
        open_store(f"{url}-elsewhere")
    with pytest.raises(UserError, match="cannot open nowhere://bucket"):
        open_store("nowhere://bucket")
