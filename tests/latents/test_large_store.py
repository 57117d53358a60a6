"""A store of a million rows opens in a moment and in little memory: what is held grows by bytes a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rae_fast.images.entries import PathTable
from rae_fast.latents.checksum import crc32c
from rae_fast.latents.layout import FAILURES, FORMAT, FORMAT_VERSION, metadata_files, planes_of, single_chunk_key
from rae_fast.latents.manifest import manifest_bytes
from rae_fast.latents.storage import open_storage

N, SHARD = 1_000_000, 2048
LOOK = """
import json, resource, sys, time
import numpy as np
from rae_fast.latents.loader import LatentLoader
from rae_fast.latents.store import open_store
before_kb, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
store = open_store(sys.argv[1])
opened_s = time.process_time() - start_s
loader = LatentLoader(store, batch_size=4, shuffle=sys.argv[2])
paths = (store.paths[0], store.paths[store.n - 1])
order = loader.order.epoch(0)
row = store.read([0, 2047], "hflip")
used_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
print(json.dumps([opened_s, used_mb, paths, len(np.unique(order[:1000])), float(row.abs().max())]))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zeros in sparse files: the first shard of each view is there, all others only in the manifest."""
    path = tmp_path_factory.mktemp("large") / "store"
    storage = open_storage(path)
    views, shape = ["original", "hflip"], [768, 16, 16]
    attrs = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "num_images": N,
        "latent_shape": shape,
        "views": views,
        "codec": "lossless",
        "shard_size": SHARD,
        "pixels": None,
        "class_names": [f"class {i}" for i in range(1000)],
        "normalization": {"source": "none", "eps": 0.0},
    }
    names = PathTable.of([f"n{row % 1000:08d}/n{row % 1000:08d}_{row:07d}.JPEG" for row in range(N)])
    head = {
        single_chunk_key("labels"): (np.arange(N) % 1000).astype("<i4").tobytes(),
        single_chunk_key("valid"): np.ones(N, bool).tobytes(),
        single_chunk_key("paths/blob"): names.blob.tobytes(),
        single_chunk_key("paths/offsets"): names.offsets.astype("<i8").tobytes(),
        FAILURES: b"",
        **metadata_files(attrs, len(names.blob)),
    }
    checks = {}
    for plane in planes_of(shape, views, "lossless", None).values():
        crc_of_zeros = crc32c(np.zeros(plane.row_bytes, np.uint8))
        head[single_chunk_key(plane.crc_array)] = np.full(N, crc_of_zeros, "<u4").tobytes()
        size = SHARD * plane.row_bytes
        checks |= {plane.shard_key(shard): (size, 0) for shard in range(-(-N // SHARD))}
        file = path / plane.shard_key(0)
        file.parent.mkdir(parents=True)
        with file.open("wb") as handle:
            handle.truncate(size)
    for key, data in head.items():
        storage.write(key, data)
        checks[key] = (len(data), crc32c(data))
    storage.write("manifest.json", manifest_bytes(checks))
    return path


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_a_million_rows_open_in_a_second_and_200_megabytes(store: Path, shuffle: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOOK, str(store), shuffle], capture_output=True, text=True, check=True)
    opened_s, used_mb, paths, distinct, largest = json.loads(done.stdout)
    assert opened_s < 1.0  # of CPU time: the machine may be busy
    assert used_mb < 200
    assert paths == ["n00000000/n00000000_0000000.JPEG", "n00000999/n00000999_0999999.JPEG"]
    assert distinct == 1000
    assert largest == 0.0
