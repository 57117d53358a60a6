"""Fixtures that several folders share: a tiny real encoder, a folder of small JPEGs, and configs over them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from rae_fast.config import Config

PATCH, INPUT_SIZE, WIDTH = 8, 32, 32
TRUNCATED = "square/013.jpg"


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dinov2 with registers of 2 layers and width 32 with seeded random weights: 16 tokens of 32 channels."""
    import torch
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    folder = tmp_path_factory.mktemp("encoder")
    config = Dinov2WithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=INPUT_SIZE,
        patch_size=PATCH,
        num_register_tokens=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2WithRegistersModel(config).save_pretrained(folder)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 JPEGs of varied size in three classes, one of them truncated."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(41):
        file = folder / ("circle", "square", "triangle")[i % 3] / f"{i:03d}.jpg"
        file.parent.mkdir(exist_ok=True)
        height, width = random.integers(33, 90, 2)
        coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file, quality=90)
    whole = (folder / TRUNCATED).read_bytes()
    (folder / TRUNCATED).write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="session")
def cache_config(tiny_encoder: Path, image_folder: Path) -> Callable[..., Config]:
    """`cache_config(path, "key=value", ...)`: builds a store of the images at `path`, in shards of 8."""

    # Here, so that tests of the kernels run on machines without OmegaConf.
    from rae_fast.config_file import load_config

    def make(path: Path | str, *overrides: str) -> Config:
        defaults = [
            f"stage_1.params.encoder_params.dinov2_path={tiny_encoder}",
            f"stage_1.params.encoder_input_size={INPUT_SIZE}",
            f"stage_1.params.decoder_patch_size={PATCH}",
            f"data.source={image_folder}",
            "data.threads=1",
            f"cache.path={path}",
            "cache.shard_size=8",
            "cache.encode_batch=3",
            "cache.precision=fp32",
            "runtime.device=cpu",
        ]
        return load_config(None, [*defaults, *overrides])

    return make


@pytest.fixture(scope="session")
def pristine_store(cache_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with pixels, lossless, built in a single go; read only."""
    from rae_fast.latents.writer import build_cache

    path = tmp_path_factory.mktemp("pristine") / "store"
    build_cache(cache_config(path, "cache.pixels=true"))
    return path


@pytest.fixture(scope="session")
def balanced_store(cache_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of int8 with scales; read only."""
    from rae_fast.latents.writer import build_cache

    path = tmp_path_factory.mktemp("balanced") / "store"
    build_cache(cache_config(path, "cache.codec=balanced"))
    return path


@pytest.fixture(scope="session")
def compact_store(cache_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of int8 in zstd frames; read only."""
    from rae_fast.latents.writer import build_cache

    path = tmp_path_factory.mktemp("compact") / "store"
    build_cache(cache_config(path, "cache.codec=compact"))
    return path


@pytest.fixture
def store_copy(pristine_store: Path, tmp_path: Path) -> Path:
    """A copy of the pristine store that a test may damage."""
    return Path(shutil.copytree(pristine_store, tmp_path / "store"))


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, Any]]:
    """`files_of(folder)`: bytes of every file below it, by relative path."""

    def read(folder: Path) -> dict[str, Any]:
        return {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }

    return read


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Torch computes with three threads, whatever it is otherwise told to here."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
