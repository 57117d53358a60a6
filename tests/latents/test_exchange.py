"""Export, import, comparison and preview: the store against other formats and against fresh encodings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rae_fast.config import Config
from rae_fast.errors import UserError
from rae_fast.latents import exports
from rae_fast.latents.compare import compare
from rae_fast.latents.exports import export
from rae_fast.latents.facts import store_facts
from rae_fast.latents.imports import import_latents
from rae_fast.latents.plan import config_of
from rae_fast.latents.preview import draw_preview, spread_rows, token_colours
from rae_fast.latents.repair import repair
from rae_fast.latents.store import open_store
from rae_fast.latents.verify import verify

Configs = Callable[..., Config]


def test_export_is_lightningdits_layout_and_imports_back(
    pristine_store: Path, tmp_path: Path, cache_config: Configs
) -> None:
    store = open_store(pristine_store)
    assert export(store, tmp_path / "out", "safetensors") == 40
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert shard.name == "latents_rank00_shard000.safetensors"
    content = load_file(shard)
    valid = np.flatnonzero(store.valid)
    assert torch.equal(content["latents"], store.denormalize(store.read(valid, "original")))
    assert torch.equal(content["latents_flip"], store.denormalize(store.read(valid, "hflip")))
    assert content["labels"].tolist() == store.labels[valid].tolist()
    statistics = torch.load(tmp_path / "out" / "latents_stats.pt")
    both = torch.cat([content["latents"], content["latents_flip"]])
    assert statistics["mean"].shape == statistics["std"].shape == (1, 32, 1, 1)
    assert torch.allclose(statistics["mean"].flatten(), both.mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(statistics["std"].flatten(), both.std((0, 2, 3)), rtol=1e-3)
    config = cache_config(tmp_path / "back", f"cache.statistics={tmp_path / 'out' / 'stat.pt'}")
    assert import_latents(tmp_path / "out", config).images == 40
    back = open_store(tmp_path / "back")
    assert torch.allclose(back.read(range(40), "hflip"), store.read(valid, "hflip"), atol=2e-3)
    assert back.labels.tolist() == store.labels[valid].tolist()
    assert verify(str(tmp_path / "back")).damages == []
    assert "unknown" in store_facts(back)["crop"]


def test_export_is_cut_into_files_of_bounded_size(
    pristine_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(pristine_store)
    monkeypatch.setattr(exports, "FILE_BYTES", 15 * 2 * 4 * 32 * 4 * 4)
    assert exports.export(store, tmp_path / "out", "safetensors") == 40
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    parts = [load_file(file) for file in files]
    assert [len(part["latents"]) for part in parts] == [15, 15, 10]
    whole = store.denormalize(store.read(np.flatnonzero(store.valid), "hflip"))
    assert torch.equal(torch.cat([part["latents_flip"] for part in parts]), whole)


def test_npy_arrays_go_out_and_come_in_with_their_own_statistics(
    pristine_store: Path, tmp_path: Path, cache_config: Configs, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    store = open_store(pristine_store)
    export(store, tmp_path / "out", "npy")
    latents = np.load(tmp_path / "out" / "latents.npy")
    assert np.array_equal(latents, store.denormalize(store.read(np.flatnonzero(store.valid))).numpy())
    latents[5, 0, 0, 0] = np.nan
    np.save(tmp_path / "out" / "latents.npy", latents)
    config = cache_config(tmp_path / "back", "cache.codec=balanced")
    report = import_latents(tmp_path / "out", config)
    assert (report.images, report.failures) == (40, 1)
    back = open_store(tmp_path / "back")
    assert [(failure["index"], failure["path"]) for failure in back.failures] == [(5, "latents.npy#5")]
    raw = np.concatenate([np.delete(latents, 5, 0), np.delete(np.load(tmp_path / "out" / "latents_flip.npy"), 5, 0)])
    assert torch.allclose(back.mean, torch.from_numpy(raw).mean(0), atol=1e-5)
    assert torch.allclose(back.var, torch.from_numpy(raw).var(0, unbiased=False), rtol=1e-4)
    before = files_of(tmp_path / "back")
    (tmp_path / "back" / "latents/original/c/2/0/0/0").unlink()
    repair(str(tmp_path / "back"), config_of(back.attrs, [f"data.source={tmp_path / 'out'}"]))
    assert files_of(tmp_path / "back") == before


def test_what_cannot_be_imported_is_said(tmp_path: Path, cache_config: Configs) -> None:
    config = cache_config(tmp_path / "store")
    with pytest.raises(UserError, match="has no latents"):
        import_latents(tmp_path, config)
    save_file({"latents": torch.zeros(3, 4, 2, 2), "labels": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="2 labels for 3 latents"):
        import_latents(tmp_path, config)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a.safetensors cannot be read"):
        import_latents(tmp_path, config)


def test_export_leaves_a_folder_with_files_alone(pristine_store: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export(open_store(pristine_store), tmp_path, "npy")
    with pytest.raises(UserError, match="layout 'csv'"):
        export(open_store(pristine_store), tmp_path, "csv")


def test_fresh_encodings_differ_from_stored_ones_by_what_the_codec_says(
    pristine_store: Path, balanced_store: Path
) -> None:
    for path, snr_db in ((pristine_store, 70), (balanced_store, 40)):
        store = open_store(path)
        found = compare(store, config_of(store.attrs), spread_rows(store, 20))
        assert found.images == 20
        for view in store.views:
            snr = found.errors[view]["snr_db"]
            assert snr is not None and snr_db < snr < snr_db + 20
            assert abs(snr - store.attrs["codec_error"]["snr_db"]) < 2


def test_comparison_in_pixels_goes_through_the_decoder(balanced_store: Path) -> None:
    store = open_store(balanced_store)
    seen = []

    def decode(z_BCHW: torch.Tensor) -> torch.Tensor:
        seen.append(len(z_BCHW))
        return z_BCHW[:, :3]

    def largest(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().flatten(1).amax(1)

    found = compare(store, config_of(store.attrs), spread_rows(store, 6), decode, {"largest": largest})
    assert sum(seen) == 12
    assert 0 < found.distances["largest"] < 0.1


def test_colours_show_the_directions_in_which_tokens_differ() -> None:
    z_BCHW = torch.zeros(4, 8, 2, 2)
    z_BCHW[:, 5, 0] = 3.0
    z_BCHW += 0.01 * torch.randn(z_BCHW.shape, generator=torch.Generator().manual_seed(0))
    colours = token_colours(z_BCHW)
    assert colours.shape == (4, 3, 2, 2)
    assert (colours[:, 0, 0] > 0.9).all()
    assert (colours[:, 0, 1] < 0.1).all()


def test_preview_puts_images_beside_both_views(
    pristine_store: Path, balanced_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_pixels, columns = draw_preview(open_store(pristine_store), 4)
    assert with_pixels.shape == (12, 32, 32, 3)
    assert columns % 3 == 0
    from_source, _ = draw_preview(open_store(balanced_store), 4)
    assert np.array_equal(from_source[::3], with_pixels[::3])
    copy = Path(shutil.copytree(balanced_store, tmp_path / "store"))
    store = open_store(copy)
    store.attrs["config"]["data"]["source"] = str(tmp_path / "gone")
    alone, _ = draw_preview(store, 4)
    assert alone.shape == (8, 128, 128, 3)
    assert "no images beside the latents" in capsys.readouterr().err
