"""On a GPU: nvJPEG's drift within what was promised, failures survived, crops on the right device and stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_fast.config import Data
from rae_fast.images import feeder
from rae_fast.images.decode import ImagePipeline
from rae_fast.images.drift import crop_drift
from rae_fast.images.entries import ImageIndex
from rae_fast.images.index import build_index

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIDE = 64
# Mean absolute difference from PIL, in levels. Replicated chroma alone costs 0.3 to 0.5, a fast transform 0.9.
FAST_MEAN_ABS = 0.25


@pytest.fixture
def index(photo: Callable, encode: Callable, write_files: Callable[[dict[str, bytes]], Path]) -> ImageIndex:
    files = {f"{i:02d}.jpg": encode(photo(90 + 13 * i, 180 - 9 * i, i), quality=85) for i in range(12)}
    return build_index(Data(source=str(write_files(files)), kind="folder"))


def test_exact_crops_on_the_gpu_are_the_reference_s_bytes(index: ImageIndex, reference_crop: Callable) -> None:
    for batch in ImagePipeline(index, None, SIDE, "exact", batch_size=5, device="cuda", threads=2):
        assert batch.images_B3SS.device.type == "cuda" and batch.valid_B.all()
        for position, image_3SS in zip(batch.positions_B.tolist(), batch.images_B3SS.cpu(), strict=True):
            assert np.array_equal(image_3SS.numpy(), reference_crop(index.read(position), SIDE))


def test_exact_crops_made_by_the_gpu_itself_are_the_same_bytes(index: ImageIndex, reference_crop: Callable) -> None:
    pipeline = ImagePipeline(index, None, SIDE, "exact", batch_size=5, device="cuda", threads=2)
    pipeline._crops_on_device = True
    for batch in pipeline:
        for position, image_3SS in zip(batch.positions_B.tolist(), batch.images_B3SS.cpu(), strict=True):
            assert np.array_equal(image_3SS.numpy(), reference_crop(index.read(position), SIDE))


def test_drift_of_the_fast_mode_is_within_what_was_promised() -> None:
    drift = crop_drift("fast", device="cuda")
    assert drift["images"] == 16
    assert drift["mean_abs"] < FAST_MEAN_ABS, drift


def test_drift_of_the_exact_mode_is_nothing_on_a_gpu_too() -> None:
    assert crop_drift("exact", device="cuda")["max_abs"] == 0


def test_the_fast_mode_survives_a_batch_that_dali_loses(
    photo: Callable, encode: Callable, write_files: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i:02d}.jpg": encode(photo(120, 90, i)) for i in range(9)}
    files["04.jpg"] = files["04.jpg"][: len(files["04.jpg"]) // 2]
    index = build_index(Data(source=str(write_files(files)), kind="folder"))
    monkeypatch.setattr(feeder, "pixels_for_dali", lambda data: 1)
    pipeline = ImagePipeline(index, None, SIDE, "fast", batch_size=3, device="cuda", threads=2)
    batches = list(pipeline)
    assert [position for batch in batches for position in batch.positions_B.tolist()] == list(range(9))
    assert [failure.position for batch in batches for failure in batch.failures] == [4]
    assert all(batch.images_B3SS[batch.valid_B].float().std() > 1 for batch in batches)


def test_batches_may_be_used_on_the_consumer_s_stream_at_once(index: ImageIndex) -> None:
    order = list(range(12)) * 20
    sums = []
    for batch in ImagePipeline(index, order, SIDE, "fast", batch_size=6, device="cuda", threads=2):
        sums += batch.images_B3SS.to(torch.int64).sum((1, 2, 3)).tolist()
    assert sums == sums[:12] * 20
