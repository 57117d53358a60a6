"""The pipeline's promise: every position once, in order, with the reference's bytes or a reason, whatever the files."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rae_fast.config import Data
from rae_fast.errors import UserError
from rae_fast.images import decode, feeder, precheck
from rae_fast.images.crop import random_plan
from rae_fast.images.dali import DaliDecoder
from rae_fast.images.decode import ImagePipeline, RandomCrop
from rae_fast.images.drift import crop_drift
from rae_fast.images.entries import ImageIndex
from rae_fast.images.index import build_index

SIDE = 48
Write = Callable[[dict[str, bytes]], Path]


@pytest.fixture(scope="module")
def good(photo: Callable, encode: Callable) -> dict[str, bytes]:
    return {f"{i:02d}.jpg": encode(photo(60 + 13 * i, 150 - 9 * i, i), quality=80 + i) for i in range(11)}


@pytest.fixture(scope="module")
def dialects(photo: Callable, encode: Callable) -> dict[str, bytes]:
    """Everything that data sets hold under the name of .JPEG, and that PIL reads."""
    image = Image.fromarray(photo(131, 97))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(photo(131, 97, 5)[..., 0]))
    deep = Image.fromarray(photo(131, 97)[..., 0].astype(np.uint16) * 300)
    gif = BytesIO()
    image.save(gif, "GIF", save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)])
    return {
        "420.jpg": encode(image, subsampling="4:2:0"),
        "422.jpg": encode(image, subsampling="4:2:2"),
        "444.jpg": encode(image, subsampling="4:4:4"),
        "progressive.jpg": encode(image, progressive=True),
        "restart.jpg": encode(image, restart_marker_blocks=2),
        "turned.jpg": encode(image, exif=exif),
        "gray.jpg": encode(image.convert("L")),
        "cmyk.jpg": encode(image.convert("CMYK")),
        "rgb.jpg": encode(image, keep_rgb=True),
        "trailing.jpg": encode(image) + b"\0" * 3000,
        "thumbnail.jpg": encode(image, exif=encode_thumbnail(encode(image.resize((20, 20))))),
        "png.jpg": encode(image, "PNG"),
        "alpha.jpg": encode(alpha, "PNG"),
        "palette.jpg": encode(image.quantize(17), "PNG"),
        "deep.jpg": encode(deep, "PNG"),
        "one-bit.jpg": encode(image.convert("1"), "PNG"),
        "webp.jpg": encode(image, "WEBP", quality=90),
        "bmp.jpg": encode(image, "BMP"),
        "tiff.jpg": encode(image, "TIFF"),
        "gif.jpg": gif.getvalue(),
        "tiny.jpg": encode(image.resize((1, 1))),
        "narrow.jpg": encode(image.resize((3, 400))),
    }


def encode_thumbnail(thumbnail: bytes) -> bytes:
    """An APP1 segment that holds a whole JPEG, end marker included."""
    return b"Exif\0\0" + thumbnail


def bad_files(whole: bytes, gif: bytes) -> dict[str, bytes]:
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "header-only.jpg": whole[:300],
        "empty.jpg": b"",
        "html.jpg": b"<html><body>404 Not Found</body></html>" * 50,
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        # Nothing is missing but the quantization tables: it passes the pre-check, and DALI loses the batch.
        "tables.jpg": whole.replace(b"\xff\xdb", b"\xff\xec"),
        "marker-only.jpg": b"\xff\xd8\xff\xd9",
        "short-gif.jpg": gif[: len(gif) // 8],
        "strip.jpg": _encoded(np.zeros((100_000, 1, 3), np.uint8)),
    }


def _encoded(image: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def index_of(folder: Path) -> ImageIndex:
    return build_index(Data(source=str(folder), kind="folder"))


def collect(pipeline: ImagePipeline) -> tuple[list[int], torch.Tensor, torch.Tensor, list]:
    batches = list(pipeline)
    return (
        [position for batch in batches for position in batch.positions_B.tolist()],
        torch.cat([batch.images_B3SS for batch in batches]),
        torch.cat([batch.valid_B for batch in batches]),
        [failure for batch in batches for failure in batch.failures],
    )


def test_any_positions_come_back_in_the_order_asked_for(
    write_files: Write, good: dict, reference_crop: Callable
) -> None:
    index = index_of(write_files(good))
    asked = [7, 2, 2, 10, 0, 5, 9, 1]
    pipeline = ImagePipeline(index, asked, SIDE, batch_size=3, threads=2)
    positions, images_N3SS, valid_N, failures = collect(pipeline)
    assert positions == asked
    assert len(pipeline) == 3
    assert images_N3SS.dtype == torch.uint8 and images_N3SS.is_contiguous()
    assert valid_N.all() and not failures
    for position, image_3SS in zip(asked, images_N3SS, strict=True):
        assert np.array_equal(image_3SS.numpy(), reference_crop(index.read(position), SIDE))


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_dialect_of_image_gives_the_reference_s_bytes(
    write_files: Write, dialects: dict, reference_crop: Callable, mode: str
) -> None:
    index = index_of(write_files(dialects))
    _, images_N3SS, valid_N, failures = collect(ImagePipeline(index, None, SIDE, mode, batch_size=8, threads=2))
    assert valid_N.all(), failures
    wrong = [
        path
        for path, image_3SS in zip(index.paths, images_N3SS, strict=True)
        if not np.array_equal(image_3SS.numpy(), reference_crop(dialects[path], SIDE))
    ]
    assert wrong == []


def test_bad_files_are_recorded_and_cost_no_good_one(
    write_files: Write, good: dict, dialects: dict, reference_crop: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, **_: torch.full(shape, 7, dtype=dtype))  # as used before
    bad = bad_files(good["03.jpg"], dialects["gif.jpg"])
    files = {f"{number:03d}-{name}": data for number, (name, data) in enumerate([*good.items(), *bad.items()] * 2)}
    index = index_of(write_files(files))
    order = np.random.default_rng(0).permutation(len(index))
    pipeline = ImagePipeline(index, order, SIDE, batch_size=7, threads=2)
    positions, images_N3SS, valid_N, failures = collect(pipeline)
    assert positions == order.tolist()
    assert pipeline.rebuilds > 0
    is_bad = {position for position in range(len(index)) if index.paths[position][4:] in bad}
    assert {failure.position for failure in failures} == is_bad == set(np.array(positions)[~valid_N.numpy()])
    for failure in failures:
        assert failure.path == index.paths[failure.position]
        assert failure.reason and "\n" not in failure.reason and "BytesIO" not in failure.reason
    for position, image_3SS, valid in zip(positions, images_N3SS, valid_N, strict=True):
        expected = reference_crop(index.read(position), SIDE) if valid else np.zeros((3, SIDE, SIDE))
        assert np.array_equal(image_3SS.numpy(), expected)


def test_reasons_say_what_is_wrong(write_files: Write, good: dict, dialects: dict) -> None:
    index = index_of(write_files(bad_files(good["03.jpg"], dialects["gif.jpg"])))
    *_, failures = collect(ImagePipeline(index, None, SIDE, threads=1))
    reasons = {failure.path: failure.reason for failure in failures}
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["html.jpg"] == "cannot identify image file"
    assert "truncated" in reasons["truncated.jpg"]
    assert "too narrow" in reasons["strip.jpg"]


def test_postscript_is_never_run(write_files: Write, photo: Callable) -> None:
    file = BytesIO()
    Image.fromarray(photo(30, 30)).save(file, "EPS")
    index = index_of(write_files({"drawing.jpg": file.getvalue()}))
    *_, failures = collect(ImagePipeline(index, None, SIDE, threads=1))
    assert failures[0].reason == "cannot identify image file"


def test_bytes_damaged_at_random_never_stop_anything(write_files: Write, dialects: dict) -> None:
    random = np.random.default_rng(0)
    files = {}
    for number in range(150):
        name = list(dialects)[number % len(dialects)]
        data = bytearray(dialects[name])
        for at in random.integers(0, len(data), 4):
            data[at] = random.integers(0, 256)
        files[f"{number:03d}-{name}"] = bytes(data[: random.integers(1, 2 * len(data))])
    pipeline = ImagePipeline(index_of(write_files(files)), None, SIDE, batch_size=16, threads=2)
    positions, _, valid_N, failures = collect(pipeline)
    assert positions == list(range(150))
    assert 10 < int(valid_N.sum()) == 150 - len(failures) < 140


def test_a_batch_that_dali_loses_is_decoded_image_by_image(
    write_files: Write, good: dict, reference_crop: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blind the pre-check, so that a truncated file reaches DALI among good ones.
    whole = good["03.jpg"]
    index = index_of(write_files({**good, "03.jpg": whole[: len(whole) // 2]}))
    monkeypatch.setattr(feeder, "pixels_for_dali", lambda data: 1)
    pipeline = ImagePipeline(index, None, SIDE, batch_size=4, threads=2)
    positions, images_N3SS, valid_N, failures = collect(pipeline)
    assert positions == list(range(len(index)))
    assert pipeline.rebuilds == 1
    assert [failure.position for failure in failures] == [3]
    assert valid_N.tolist() == [position != 3 for position in positions]
    for position in set(positions) - {3}:
        assert np.array_equal(images_N3SS[position].numpy(), reference_crop(index.read(position), SIDE))


def test_a_decoder_that_fails_every_time_still_gives_every_image(
    write_files: Write, good: dict, reference_crop: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> None:
        raise RuntimeError("Critical error in pipeline")

    monkeypatch.setattr(DaliDecoder, "submit", lambda *_: None)
    monkeypatch.setattr(DaliDecoder, "result", lose)
    index = index_of(write_files(good))
    pipeline = ImagePipeline(index, None, SIDE, batch_size=4, threads=2)
    _, images_N3SS, valid_N, _ = collect(pipeline)
    assert valid_N.all() and pipeline.rebuilds == 3
    for position in range(len(index)):
        assert np.array_equal(images_N3SS[position].numpy(), reference_crop(index.read(position), SIDE))


def test_files_that_vanish_while_decoding_are_failures(write_files: Write, good: dict) -> None:
    folder = write_files(good)
    index = index_of(folder)
    batches = iter(ImagePipeline(index, [0, 1, 2] * 60, SIDE, batch_size=3, threads=1))
    next(batches)
    (folder / "01.jpg").unlink()
    last = list(batches)[-1]
    assert last.valid_B.tolist() == [True, False, True]
    assert last.failures == [(1, "01.jpg", "cannot be read: No such file or directory")]


def test_large_images_are_decoded_in_parts_of_bounded_memory(
    write_files: Write, good: dict, reference_crop: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    submit = DaliDecoder.submit
    monkeypatch.setattr(DaliDecoder, "submit", lambda self, data: sizes.append(len(data)) or submit(self, data))
    monkeypatch.setattr(feeder, "MAX_PART_PIXELS", 25_000)
    index = index_of(write_files(good))
    _, images_N3SS, valid_N, _ = collect(ImagePipeline(index, None, SIDE, batch_size=11, threads=2))
    assert sum(sizes) == 11 and len(sizes) > 3
    assert valid_N.all()
    for position in range(11):
        assert np.array_equal(images_N3SS[position].numpy(), reference_crop(index.read(position), SIDE))


def test_images_beyond_dali_s_limit_go_through_pil_one_at_a_time(
    write_files: Write, photo: Callable, encode: Callable, reference_crop: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = [], []
    original = precheck.LARGE

    class Counting:
        def __enter__(self) -> None:
            original.acquire()
            at_once.append(1)
            most.append(len(at_once))

        def __exit__(self, *_: object) -> None:
            at_once.pop()
            original.release()

    monkeypatch.setattr(precheck, "MAX_DALI_PIXELS", 5000)
    monkeypatch.setattr(precheck, "LARGE", Counting())
    data = {f"{i}.jpg": encode(photo(110 + i, 90)) for i in range(6)}
    index = index_of(write_files(data))
    _, images_N3SS, valid_N, _ = collect(ImagePipeline(index, None, SIDE, threads=3))
    assert valid_N.all() and len(most) == 6 and max(most) == 1
    assert np.array_equal(images_N3SS[5].numpy(), reference_crop(data["5.jpg"], SIDE))


def test_a_decompression_bomb_is_a_failure(write_files: Write, good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    index = index_of(write_files({"bomb.png": _encoded(np.zeros((60, 60, 3), np.uint8))}))
    *_, failures = collect(ImagePipeline(index, None, SIDE, threads=1))
    assert "decompression bomb" in failures[0].reason


def test_a_consumer_that_stops_early_leaves_no_thread_behind(write_files: Write, good: dict) -> None:
    index = index_of(write_files(good))
    before = threading.active_count()
    batches = iter(ImagePipeline(index, list(range(11)) * 20, SIDE, batch_size=2, threads=2))
    next(batches)
    batches.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_the_end_of_a_pipeline_does_not_wait_for_batches(
    write_files: Write, good: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None come any more: each wait for one was 50 milliseconds, paid at every epoch's end."""
    waits = []

    class Watched(queue.Queue):
        def put(self, item: object, *args: Any) -> None:
            super().put(item, *args)
            if item is None:
                time.sleep(0.3)  # the producer is still alive when the consumer has all batches

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            waits.extend([] if timeout is None else [timeout])
            return super().get(block, timeout)

    monkeypatch.setattr(decode.queue, "Queue", Watched)
    assert len(list(ImagePipeline(index_of(write_files(good)), None, SIDE, batch_size=4, threads=2))) == 3
    assert waits == []


def test_a_fault_of_ours_reaches_the_consumer(write_files: Write, good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise LookupError("a fault of ours")

    monkeypatch.setattr(decode, "crop_into", fault)
    with pytest.raises(LookupError, match="a fault of ours"):
        list(ImagePipeline(index_of(write_files(good)), None, SIDE, threads=1))


def test_random_crops_depend_on_seed_epoch_and_position_alone(write_files: Write, good: dict) -> None:
    index = index_of(write_files(good))

    def crops(positions: list[int], batch_size: int, **draws: int) -> dict[int, bytes]:
        random_crop = RandomCrop(short_side=64, **{"seed": 3, **draws})
        pipeline = ImagePipeline(index, positions, SIDE, batch_size=batch_size, threads=2, random_crop=random_crop)
        found, images_N3SS, valid_N, _ = collect(pipeline)
        assert valid_N.all()
        return {position: image.numpy().tobytes() for position, image in zip(found, images_N3SS, strict=True)}

    once = crops(list(range(11)), 4)
    assert crops([8, 3, 5], 2) == {position: once[position] for position in (8, 3, 5)}
    assert crops(list(range(11)), 4, epoch=1) != once
    assert crops(list(range(11)), 4, seed=4) != once

    draw = RandomCrop(64, 3).draws(np.array([5]))[0].tolist()
    with Image.open(BytesIO(index.read(5))) as image:
        plan = random_plan(image.width, image.height, SIDE, 64, *draw)
        resized = image.convert("RGB").resize(plan.resizes[0][:2], resample=Image.Resampling.BICUBIC)
    window = resized.crop((plan.left, plan.top, plan.left + SIDE, plan.top + SIDE))
    assert once[5] == np.asarray(window).transpose(2, 0, 1).tobytes()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_crops_on_the_device_are_the_same_bytes(
    write_files: Write, dialects: dict, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(write_files(dialects))
    on_cpu = ImagePipeline(index, None, SIDE, mode, batch_size=5, threads=2)
    on_device = ImagePipeline(index, None, SIDE, mode, batch_size=5, threads=2)
    monkeypatch.setattr(on_device, "_crops_on_device", True)
    for expected, found in zip(collect(on_cpu), collect(on_device), strict=True):
        assert torch.equal(expected, found) if isinstance(expected, torch.Tensor) else expected == found


def test_without_dali_pil_decodes_the_same_bytes_and_it_is_said(
    write_files: Write, good: dict, reference_crop: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    feeder.dali_or_none.cache_clear()
    index = index_of(write_files(good))
    try:
        with pytest.warns(UserWarning, match="images are decoded by PIL"):
            pipeline = ImagePipeline(index, None, SIDE, threads=2)
            _, images_N3SS, valid_N, _ = collect(pipeline)
    finally:
        feeder.dali_or_none.cache_clear()
    assert valid_N.all()
    assert np.array_equal(images_N3SS[4].numpy(), reference_crop(index.read(4), SIDE))


def test_an_unknown_crop_mode_is_refused(write_files: Write, good: dict) -> None:
    with pytest.raises(UserError, match=r"data\.crop is 'quick'"):
        ImagePipeline(index_of(write_files(good)), None, SIDE, "quick")


def test_no_positions_give_no_batches(write_files: Write, good: dict) -> None:
    assert list(ImagePipeline(index_of(write_files(good)), [], SIDE)) == []


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.os, "sched_getaffinity", lambda _: range(24))
    assert decode.default_threads() == 24
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decode.default_threads() == 3


def test_drift_of_exact_crops_is_nothing() -> None:
    drift = crop_drift("exact", images=6)
    assert (drift["mean_abs"], drift["max_abs"], drift["equal_share"], drift["images"]) == (0.0, 0, 1.0, 6)


def test_drift_is_measured_on_the_data_itself(write_files: Write, good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(write_files({**good, "05.jpg": b"not an image"}))
    original = decode.crop_into

    def off_by_two(image_HW3: np.ndarray, plan: object, out_3SS: np.ndarray) -> None:
        original(image_HW3, plan, out_3SS)
        out_3SS[:] = np.where(out_3SS < 128, out_3SS + 2, out_3SS - 2)

    monkeypatch.setattr(decode, "crop_into", off_by_two)
    drift = crop_drift("fast", index=index, image_size=32)
    assert (drift["mean_abs"], drift["max_abs"], drift["equal_share"], drift["images"]) == (2.0, 2, 0.0, 10)
