"""What a build decides for itself: statistics of a subset, the encoder's batch; and ranks on several machines."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rae_fast.config import Config
from rae_fast.config_file import to_yaml
from rae_fast.latents import sink
from rae_fast.latents.encode import CPU_ENCODE_BATCH, LARGEST_ENCODE_BATCH, LatentEncoder
from rae_fast.latents.store import open_store
from rae_fast.latents.verify import verify
from rae_fast.latents.writer import build_cache
from rae_fast.rng import permutation

Configs = Callable[..., Config]
ROOT = Path(__file__).parents[2]


def test_statistics_of_a_seeded_subset_are_those_of_its_images(
    cache_config: Configs, pristine_store: Path, tmp_path: Path
) -> None:
    build_cache(cache_config(tmp_path / "store", "cache.statistics_images=10", "cache.encode_batch=4"))
    store, whole = open_store(tmp_path / "store"), open_store(pristine_store)
    rows = np.sort(permutation(0, 0, 41)[:10])
    rows = rows[whole.valid[rows]]
    raw = torch.cat([whole.denormalize(whole.read(rows, view)) for view in whole.views]).double()
    torch.testing.assert_close(store.mean, raw.mean(0).float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(store.var, raw.var(0, unbiased=False).float(), atol=5e-3, rtol=1e-2)
    assert store.attrs["normalization"]["images"] == 10
    assert int(store.valid.sum()) == 40
    assert not torch.equal(store.mean, whole.mean)


def test_batch_on_a_cpu_is_fixed_and_never_larger_than_a_shard(cache_config: Configs) -> None:
    config = cache_config("unused")
    encoder = LatentEncoder(config.stage_1.params, "fp32", torch.device("cpu"))
    assert [encoder.largest_batch(32, limit) for limit in (8, 1000)] == [8, CPU_ENCODE_BATCH]


@pytest.mark.gpu
def test_batch_on_a_gpu_is_what_fits_in_its_memory(cache_config: Configs) -> None:
    config = cache_config("unused")
    encoder = LatentEncoder(config.stage_1.params, "fp32", torch.device("cuda"))
    assert encoder.largest_batch(32, 100) == 64
    assert encoder.largest_batch(32, 4096) == LARGEST_ENCODE_BATCH
    # A quarter of a gigabyte holds the input of some crops of 1024 pixels (12 MB as float32), and never of 1024.
    torch.cuda.set_per_process_memory_fraction(2**28 / torch.cuda.mem_get_info()[1])
    try:
        assert 1 <= encoder.largest_batch(1024, 4096) <= 16
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_launchers_of_two_ranks_build_the_same_bytes(
    cache_config: Configs, tmp_path: Path, pristine_store: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    """As on two machines that share a file system: each launcher numbers its ranks from 0 on."""
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(cache_config(tmp_path / "store", "cache.pixels=true")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"),
                *("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *(str(ROOT / "tools/build_cache.py"), "--config", str(config)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        for node in range(2)
    ]
    assert [launcher.wait(1000) for launcher in launchers] == [0, 0]
    assert files_of(tmp_path / "store") == files_of(pristine_store)
    assert verify(str(tmp_path / "store")).damages == []


@pytest.mark.usefixtures("three_threads")
def test_shards_are_written_without_helper_threads(
    cache_config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another team of OpenMP threads the encoder would run at half its speed on a CPU."""
    seen = []
    write_batch = sink.write_batch

    def spy(*args: Any) -> None:
        seen.append(torch.get_num_threads())
        write_batch(*args)

    monkeypatch.setattr(sink, "write_batch", spy)
    build_cache(cache_config(tmp_path / "store"))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 3
