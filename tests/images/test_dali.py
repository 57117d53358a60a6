"""DALI's silent defaults: each is shown to do harm, and shown not to be what we use."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rae_fast.images import dali
from rae_fast.images.dali import DECODER_OPTIONS, DaliDecoder

fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")


def decode_with(options: dict[str, Any], encoded: bytes, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(dali, "DECODER_OPTIONS", options)
    decoder = DaliDecoder(batch_size=1, threads=1)
    decoder.submit([encoded])
    return np.array(np.from_dlpack(decoder.result()[0]))


def without(option: str) -> dict[str, Any]:
    return {name: value for name, value in DECODER_OPTIONS.items() if name != option}


def by_pil(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(encoded)).convert("RGB"))


def test_exif_orientation_is_ignored_as_in_the_reference(
    photo: Callable, encode: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(photo(90, 60), exif=exif)
    assert decode_with(without("adjust_orientation"), turned, monkeypatch).shape == (90, 60, 3)
    assert np.array_equal(decode_with(DECODER_OPTIONS, turned, monkeypatch), by_pil(turned))


def test_the_accurate_inverse_transform_is_used(
    photo: Callable, encode: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(photo(160, 120))
    quick = decode_with({**DECODER_OPTIONS, "use_fast_idct": True}, encoded, monkeypatch).astype(int)
    assert np.abs(quick - by_pil(encoded)).mean() > 0.1
    assert np.array_equal(decode_with(DECODER_OPTIONS, encoded, monkeypatch), by_pil(encoded))


def test_chroma_is_upsampled_smoothly_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def image(encoded: Any, **options: Any) -> Any:
        asked.update(options)
        return fn.resize(fn.zeros(shape=(1, 1, 3)), size=(1, 1))

    monkeypatch.setattr(fn.decoders, "image", image)
    monkeypatch.setattr("nvidia.dali.Pipeline.build", lambda _: None)
    DaliDecoder(batch_size=1, threads=1, device_id=0, hw_decoder_load=0.3)
    assert asked["device"] == "mixed"
    assert asked["jpeg_fancy_upsampling"] is True
    assert (asked["adjust_orientation"], asked["use_fast_idct"]) == (False, False)
    assert asked["hw_decoder_load"] == 0.3


def test_a_lost_batch_says_so_and_the_next_one_works(photo: Callable, encode: Callable) -> None:
    whole = encode(photo(80, 64))
    decoder = DaliDecoder(batch_size=3, threads=1)
    decoder.submit([whole, whole[: len(whole) // 2], whole])
    with pytest.raises(RuntimeError, match="decode"):
        decoder.result()
    assert decoder.rebuilds == 1
    decoder.submit([whole, whole])
    for image in decoder.result():
        assert np.array_equal(np.from_dlpack(image), by_pil(whole))


def test_images_outlive_the_batches_after_them(photo: Callable, encode: Callable) -> None:
    batches = [[encode(photo(40 + 10 * i, 50 + j)) for j in range(3)] for i in range(6)]
    decoder = DaliDecoder(batch_size=3, threads=2)
    kept = []
    for batch in batches:
        decoder.submit(batch)
        kept.append([np.from_dlpack(image) for image in decoder.result()])
    for batch, images in zip(batches, kept, strict=True):
        for encoded, image in zip(batch, images, strict=True):
            assert np.array_equal(image, by_pil(encoded))
