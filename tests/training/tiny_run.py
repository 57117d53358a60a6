"""A small latent store and a config for it, without images or encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.images.entries import PathTable
from rae_fast.latents.build import Build
from rae_fast.latents.codecs import CodecError, get_codec
from rae_fast.latents.finish import finish
from rae_fast.latents.layout import FORMAT, FORMAT_VERSION
from rae_fast.latents.normalization import MEAN, VAR
from rae_fast.latents.records import ShardRecord, write_record
from rae_fast.latents.shard import write_shard
from rae_fast.latents.sink import complete_record
from rae_fast.latents.storage import open_storage
from rae_fast.latents.store import create_store
from rae_fast.runtime import Ranks

SHAPE = (8, 4, 4)
CLASSES = 4

CONFIG = """
stage_1:
  params: {encoder_cls: Dinov2withNorm, encoder_input_size: 56}
stage_2:
  target: DiTDH
  params: {hidden_size: [32, 32], depth: [2, 1], num_heads: [2, 2], class_dropout_prob: 0.1}
transport: {params: {time_dist_type: logit-normal_0_1}}
misc: {latent_size: [8, 4, 4]}
training:
  max_steps: 12
  global_batch_size: 16
  ema_decay: [0.9, 0.5]
  log_interval: 1
  checkpoint_interval: null
  checkpoint_every: 4
  sample_every: null
  global_seed: 3
  optimizer: {lr: 1.0e-3}
  scheduler: {type: cosine, warmup_steps: 2, warmup_from_zero: true, decay_end_steps: 12, final_lr: 1.0e-4}
runtime: {device: cpu, precision: fp32}
"""


def make_store(path: Path, n: int = 64, shape: tuple[int, int, int] = SHAPE, *, input_size: int = 56) -> Path:
    """A complete store of `n` seeded random latents in both views; row i is of class i mod 4."""
    attrs = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "num_images": n,
        "latent_shape": list(shape),
        "views": ["original", "hflip"],
        "codec": "lossless",
        "shard_size": 32,
        "pixels": None,
        "image_size": 64,
        "crop": "exact",
        "encoder": {"name": "synthetic", "weights_sha256": "0" * 64, "input_size": input_size},
        "normalization": {"source": "computed", "eps": 1e-5},
        "class_names": [f"class{c}" for c in range(CLASSES)],
        "dataset": {"kind": "imagefolder", "source": "none", "segments": [{"images": n, "digest": f"{n}"}]},
        "versions": {},
    }
    storage = open_storage(path)
    build = Build(Ranks(), storage, attrs, job=None)
    create_store(storage, attrs, PathTable.of([f"{i}.jpg" for i in range(n)]), np.arange(n) % CLASSES)
    storage.write(MEAN, np.zeros(shape, "<f4").tobytes())
    storage.write(VAR, np.ones(shape, "<f4").tobytes())
    latents = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    views = {"original": latents, "hflip": latents.flip(-1)}
    for shard in build.shards:
        rows, record, error, files = build.rows(shard), ShardRecord(shard), CodecError(), {}
        for name, plane in build.planes.items():
            stored, _ = get_codec("lossless").encode(views[name][rows.start : rows.stop])
            with write_shard(storage, plane, shard, attrs["shard_size"]) as files[name]:
                files[name].append(stored.numpy())
        record.valid = [True] * len(rows)
        write_record(storage, complete_record(build, record, files, error))
    finish(build)
    return path


def make_config(folder: Path, store: Path, *overrides: str, run: str = "run") -> Config:
    """The config of a run on a store."""
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    return load_config(path, [f"cache.path={store}", f"logging.run_folder={folder / run}", *overrides])
