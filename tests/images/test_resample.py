"""The native loops: compiled once, refused when wrong, replaced by PIL when there are none."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_fast import native
from rae_fast.images import resample
from rae_fast.images.crop import center_plan, crop_pil

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler here")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache of compiled code, and no memory of what was loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    resample.native_or_none.cache_clear()
    yield
    resample.native_or_none.cache_clear()


def by_pil(image_HW3: np.ndarray, size: int) -> np.ndarray:
    plan = center_plan(*image_HW3.shape[1::-1], size)
    return np.asarray(crop_pil(Image.fromarray(image_HW3), plan)).transpose(2, 0, 1)


def by_cpu(image_HW3: np.ndarray, size: int) -> np.ndarray:
    out_3SS = np.empty((3, size, size), np.uint8)
    resample.crop_into(image_HW3, center_plan(*image_HW3.shape[1::-1], size), out_3SS)
    return out_3SS


@needs_compiler
def test_compiled_code_is_kept_for_the_next_process(
    unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resample.load_native()
    assert len(list((tmp_path / "cache").rglob("resample-*.so"))) == 1
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    resample.load_native()


def test_without_a_compiler_pil_makes_the_same_bytes_and_says_so_once(
    unloaded: None, monkeypatch: pytest.MonkeyPatch, photo: Callable
) -> None:
    image_HW3 = photo(83, 61)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="crops are made by PIL.*no C compiler") as warned:
        first, second = by_cpu(image_HW3, 24), by_cpu(image_HW3, 24)
    assert len(warned) == 1
    assert np.array_equal(first, by_pil(image_HW3, 24))
    assert np.array_equal(second, first)


@needs_compiler
def test_a_compiler_that_fails_is_quoted(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "FLAGS", (*resample.FLAGS, "-fno-such-flag"))
    with pytest.raises(native.NativeUnavailableError, match="no-such-flag"):
        resample.load_native()


@needs_compiler
def test_code_that_gives_wrong_bytes_is_refused(
    unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = tmp_path / "resample.c"
    wrong.write_text(resample.SOURCE.read_text().replace("#define PRECISION_BITS 22", "#define PRECISION_BITS 12"))
    monkeypatch.setattr(resample, "SOURCE", wrong)
    with pytest.raises(native.NativeUnavailableError, match="wrong bytes"):
        resample.load_native()


@needs_compiler
def test_where_there_is_a_compiler_the_native_loops_are_what_runs() -> None:
    assert resample.native_or_none() is not None


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86")
@pytest.mark.parametrize("without", ["-mno-avx512vbmi", "-mno-avx2"])
def test_bytes_do_not_depend_on_the_vectors_that_a_cpu_has(
    unloaded: None, without: str, monkeypatch: pytest.MonkeyPatch, photo: Callable
) -> None:
    monkeypatch.setattr(resample, "FLAGS", (*resample.FLAGS, without))
    resample.load_native()
    for height, width, size in ((375, 500, 256), (97, 61, 64), (130, 33, 16), (5, 41, 3), (3, 2, 40), (700, 23, 8)):
        image_HW3 = photo(height, width)
        assert np.array_equal(by_cpu(image_HW3, size), by_pil(image_HW3, size)), (height, width, size)


@needs_compiler
def test_another_cpu_sharing_the_cache_compiles_for_itself(
    unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resample.load_native()
    monkeypatch.setattr(native, "_cpu", lambda: "another CPU")
    resample.load_native()
    assert len(list((tmp_path / "cache").rglob("resample-*.so"))) == 2


def test_threads_do_not_disturb_each_other(photo: Callable) -> None:
    images = [photo(40 + 7 * i, 90 - 3 * i, i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        crops = list(pool.map(lambda image_HW3: by_cpu(image_HW3, 16), images * 4))
    for image_HW3, crop in zip(images * 4, crops, strict=True):
        assert np.array_equal(crop, by_pil(image_HW3, 16))
