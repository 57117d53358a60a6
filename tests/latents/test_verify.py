from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rae_fast.errors import UserError
from rae_fast.latents.layout import BACKUP, MANIFEST, is_head
from rae_fast.latents.manifest import backup_bytes, intact_head, manifest_bytes
from rae_fast.latents.plan import config_of
from rae_fast.latents.repair import repair
from rae_fast.latents.store import open_store
from rae_fast.latents.verify import open_intact_url, verify

Files = Callable[[Path], dict[str, Any]]


def flip_bit(file: Path, at: int, bit: int = 3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))


def mend(store: Path) -> Any:
    return repair(str(store), config_of(open_intact_url(str(store)).attrs))


def test_untouched_store_is_whole(pristine_store: Path) -> None:
    report = verify(str(pristine_store))
    assert report.damages == []
    assert report.strays == []
    assert report.files == sum(file.is_file() for file in pristine_store.rglob("*"))


def test_flipped_bit_in_every_small_file_is_found_and_mended_to_identical_bytes(
    store_copy: Path, files_of: Files
) -> None:
    before = files_of(store_copy)
    draw = random.Random(0)
    for key in filter(is_head, before):
        if before[key]:
            flip_bit(store_copy / key, draw.randrange(len(before[key])), draw.randrange(8))
            assert [damage.key for damage in verify(str(store_copy)).damages] == [key]
            mend(store_copy)
            assert files_of(store_copy) == before, key


def test_flipped_bit_in_every_shard_is_found_and_mended_to_identical_bytes(store_copy: Path, files_of: Files) -> None:
    before = files_of(store_copy)
    draw = random.Random(1)
    shards = [key for key in before if not is_head(key)]
    assert len(shards) == 3 * 6
    for key in shards:
        flip_bit(store_copy / key, draw.randrange(len(before[key])), draw.randrange(8))
    assert sorted(damage.key for damage in verify(str(store_copy)).damages) == sorted(shards)
    mend(store_copy)
    assert files_of(store_copy) == before


def test_damaged_shards_are_named_with_their_rows_and_encoded_to_identical_bytes(
    store_copy: Path, files_of: Files
) -> None:
    before = files_of(store_copy)
    row_bytes = open_store(store_copy).planes["hflip"].row_bytes
    flip_bit(store_copy / "latents/hflip/c/2/0/0/0", 5 * row_bytes + 7)
    (store_copy / "latents/original/c/0/0/0/0").unlink()
    with (store_copy / "pixels/c/4/0/0/0").open("r+b") as file:
        file.truncate(100)
    damages = {damage.key: damage for damage in verify(str(store_copy)).damages}
    assert damages["latents/hflip/c/2/0/0/0"].rows == [2 * 8 + 5]
    assert damages["latents/hflip/c/2/0/0/0"].shard == 2
    assert damages["latents/original/c/0/0/0/0"].rows == list(range(8))
    assert damages["pixels/c/4/0/0/0"].plane == "pixels"
    report = mend(store_copy)
    assert (report.shards, report.changed) == ([0, 2, 4], [])
    assert files_of(store_copy) == before


def test_damaged_scales_are_encoded_again(balanced_store: Path, tmp_path: Path, files_of: Files) -> None:
    store = Path(shutil.copytree(balanced_store, tmp_path / "store"))
    flip_bit(store / "scale/original/c/1/0", 10)
    with pytest.raises(UserError, match=r"shard 1 of latents/original.*inspect_cache.py repair"):
        open_store(store).read(range(8, 16))
    assert str(verify(str(store)).damages[0]).startswith("shard 1 of original: scale/original/c/1/0")
    mend(store)
    assert files_of(store) == files_of(balanced_store)


def test_reader_refuses_a_flipped_bit_rather_than_serving_it(store_copy: Path) -> None:
    store = open_store(store_copy)
    flip_bit(store_copy / "latents/original/c/1/0/0/0", 0)
    assert len(store.read([7, 9]))
    with pytest.raises(UserError, match="shard 1 of latents/original: row 8"):
        store.read([8])


@pytest.mark.parametrize("key", ["zarr.json", "labels/c/0", "valid/c/0", "crc32c/original/c/0", "manifest.json"])
def test_damaged_small_file_is_refused(store_copy: Path, key: str) -> None:
    size = (store_copy / key).stat().st_size
    flip_bit(store_copy / key, size // 2, 0)
    with pytest.raises(UserError, match=r"inspect_cache\.py repair"):
        store = open_store(store_copy)
        _ = store.labels, store.valid, store.read([0])


def test_file_and_backup_both_damaged_is_said(store_copy: Path) -> None:
    flip_bit(store_copy / "labels/c/0", 0)
    (store_copy / "head.backup.tar").unlink()
    with pytest.raises(UserError, match="labels/c/0 is damaged, and so is its copy"):
        open_intact_url(str(store_copy))


def test_repair_refuses_another_encoder(store_copy: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_encoder, tmp_path / "other"))
    weights = {name: torch.roll(tensor, 1) for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    flip_bit(store_copy / "latents/original/c/1/0/0/0", 0)
    config = config_of(open_store(store_copy).attrs, [f"stage_1.params.encoder_params.dinov2_path={other}"])
    with pytest.raises(UserError, match=r"encoder.weights_sha256"):
        repair(str(store_copy), config)


def test_repair_refuses_when_an_image_is_gone(store_copy: Path, image_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(image_folder, tmp_path / "images"))
    store = open_store(store_copy)
    row = 10
    (source / store.paths[row]).write_bytes(b"no longer an image")
    flip_bit(store_copy / "latents/original/c/1/0/0/0", 0)
    with pytest.raises(UserError, match=r"can no longer be decoded"):
        repair(str(store_copy), config_of(store.attrs, [f"data.source={source}"]))


def test_repair_elsewhere_that_rounds_differently_keeps_the_store_consistent(store_copy: Path) -> None:
    """A manifest that expects other bytes stands for a machine that rounds otherwise: checksums are written anew."""
    flip_bit(store_copy / "latents/original/c/1/0/0/0", 0)
    old = open_store(store_copy).read(range(16, 24))
    config = config_of(open_store(store_copy).attrs)
    store = open_intact_url(str(store_copy))
    assert store.checks is not None
    shard = "latents/original/c/1/0/0/0"
    head = intact_head(store.storage, store.checks)
    store.checks[shard] = (store.checks[shard][0], store.checks[shard][1] ^ 1)
    manifest = manifest_bytes(store.checks)
    (store_copy / "manifest.json").write_bytes(manifest)
    (store_copy / "head.backup.tar").write_bytes(backup_bytes({**head, "manifest.json": manifest}))
    assert repair(str(store_copy), config).changed == [1]
    assert verify(str(store_copy)).damages == []
    assert np.array_equal(open_store(store_copy).read(range(16, 24)), old)
    assert len(open_store(store_copy).read(range(8, 16))) == 8


def test_no_store_and_an_unfinished_one_are_not_called_damaged(store_copy: Path, tmp_path: Path) -> None:
    for url, said in ((tmp_path / "nothing", "no latent store at"), (store_copy, "is incomplete")):
        for name in (MANIFEST, BACKUP):
            (url / name).unlink(missing_ok=True)
        with pytest.raises(UserError, match=said):
            verify(str(url))
        with pytest.raises(UserError, match=said):
            open_intact_url(str(url))
