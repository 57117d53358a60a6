"""tools/inspect_cache.py, command by command, as it is called."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg16

from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder
from rae_fast.errors import UserError
from rae_fast.evaluation.reconstruction import psnr
from rae_fast.interop.diffusers import decoder_json
from rae_fast.interop.official import save_weights
from rae_fast.latents.loader import LatentLoader
from rae_fast.latents.manifest import backup_bytes, manifest_bytes
from rae_fast.latents.plan import config_of
from rae_fast.latents.preview import spread_rows
from rae_fast.latents.repair import repair_build
from rae_fast.latents.stats import load_statistics
from rae_fast.latents.storage import open_storage
from rae_fast.latents.store import open_store
from rae_fast.provenance import write_json
from rae_fast.runtime import Ranks


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_cache", Path(__file__).parents[2] / "tools/inspect_cache.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`call("verify", store)`: exit status, and what it printed."""

    def run(*arguments: Any) -> tuple[int, str]:
        args = tool.make_parser().parse_args([str(argument) for argument in arguments])
        return args.run(args), capsys.readouterr().out

    return run


def test_info_is_a_page_of_facts_or_json(call: Callable, pristine_store: Path) -> None:
    status, page = call("info", pristine_store)
    assert status == 0
    assert "41 (40 valid, 1 failures)" in page
    assert "3 (13 to 14 images each): circle, square, triangle" in page
    facts = json.loads(call("info", pristine_store, "--json")[1])
    assert facts["latents"] == "32 x 4 x 4, views original, hflip"
    assert facts["state"] == "complete"


def test_preview_is_a_grid_of_images_beside_their_latents(call: Callable, pristine_store: Path, tmp_path: Path) -> None:
    assert call("info", pristine_store, "--preview", tmp_path / "grid.png", "--images", 4)[0] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        pixels = np.asarray(grid.convert("RGB"))
    shown = open_store(pristine_store).read_pixels(spread_rows(open_store(pristine_store), 4))
    first = shown[0].permute(1, 2, 0).numpy()
    places = [
        (y, x)
        for y in range(pixels.shape[0] - 31)
        for x in range(pixels.shape[1] - 31)
        if np.array_equal(pixels[y, x], first[0, 0]) and np.array_equal(pixels[y : y + 32, x : x + 32], first)
    ]
    assert len(places) == 1


def test_verify_names_the_shard_and_repair_brings_it_back(
    call: Callable, store_copy: Path, files_of: Callable[[Path], dict[str, Any]]
) -> None:
    before = files_of(store_copy)
    assert call("verify", store_copy)[0] == 0
    shard = store_copy / "latents/hflip/c/4/0/0/0"
    data = bytearray(shard.read_bytes())
    data[9] ^= 1
    shard.write_bytes(data)
    status, said = call("verify", store_copy, "--threads", 2)
    assert status == 1
    assert "damaged: shard 4 of hflip: latents/hflip/c/4/0/0/0 does not match its checksum (rows 32)" in said
    status, said = call("repair", store_copy)
    assert status == 0
    assert "encoded shard 4 again\n" in said
    assert files_of(store_copy) == before


@pytest.fixture
def decoder(tmp_path: Path) -> list[str]:
    """Overrides that name a decoder of these latents, and weights for LPIPS."""
    sizes = DecoderConfig(
        hidden_size=32,
        grid=4,
        patch_size=8,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_weights(tmp_path / "decoder.pt", ViTDecoder(sizes).state_dict())
        vgg = {f"features.{name}": tensor for name, tensor in vgg16(weights=None).features.state_dict().items()}
    torch.save(vgg, tmp_path / "vgg.pth")
    write_json(tmp_path / "decoder.json", decoder_json(sizes))
    return [
        f"stage_1.params.decoder_config_path={tmp_path / 'decoder.json'}",
        f"stage_1.params.pretrained_decoder_path={tmp_path / 'decoder.pt'}",
        f"gan.loss.lpips_weights={tmp_path / 'vgg.pth'}",
    ]


def test_compare_measures_latents_and_decoded_pixels(call: Callable, balanced_store: Path, decoder: list[str]) -> None:
    status, said = call("compare", balanced_store, *decoder, "--images", 6)
    found = json.loads(said)
    assert status == 0
    assert found["images"] == 6
    assert 40 < found["original"]["snr_db"] < 60
    assert 0 <= found["lpips"] < 0.1
    from rae_fast.evaluation.fidelity import store_decoder

    store = open_store(balanced_store)
    config = config_of(store.attrs, decoder)
    rows = spread_rows(store, 6)
    build = repair_build(store, config, frozenset(store.views), Ranks())
    from rae_fast.latents.compare import _units

    fresh = torch.cat([build.normalize(batch.planes["original"]) for batch in build.encode(_units(build, rows))])
    decode = store_decoder(config, store)
    assert decode is not None
    pair = (decode(z_BCHW).clamp(0, 1) for z_BCHW in (store.read(rows), fresh))
    assert found["psnr_db"] == pytest.approx(float(psnr(*pair).mean()), abs=0.2)
    assert "psnr_db" not in json.loads(call("compare", balanced_store, "--images", 2)[1])


def test_statistics_go_out_and_are_taken_again(call: Callable, pristine_store: Path, tmp_path: Path) -> None:
    assert call("statistics", pristine_store, tmp_path / "stat.pt")[0] == 0
    store = open_store(pristine_store)
    mean, var = load_statistics(str(tmp_path / "stat.pt"), store.latent_shape)
    assert torch.equal(mean, store.mean)
    assert torch.equal(var, store.var)


@pytest.mark.parametrize("layout", ["safetensors", "npy"])
def test_export_and_import(call: Callable, pristine_store: Path, tmp_path: Path, layout: str) -> None:
    assert "40 images" in call("export", pristine_store, tmp_path / "out", "--layout", layout)[1]
    status, said = call("import", tmp_path / "out", tmp_path / "back", "cache.shard_size=16", "cache.codec=compact")
    assert status == 0
    assert "complete, 40 images, 0 failures" in said
    assert call("verify", tmp_path / "back")[0] == 0


def test_every_command_refuses_a_store_of_another_format_version(
    call: Callable, store_copy: Path, tmp_path: Path
) -> None:
    """Written as a later version would write it: whole, with checksums that match."""
    checks = dict(open_store(store_copy).checks or {})
    root = store_copy / "zarr.json"
    content = json.loads(root.read_text())
    content["attributes"]["format_version"] = 2
    from rae_fast.latents import manifest
    from rae_fast.latents.checksum import crc32c
    from rae_fast.latents.layout import canonical_json

    root.write_bytes(canonical_json(content))
    checks["zarr.json"] = (root.stat().st_size, crc32c(root.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "FORMAT_VERSION", 2)
        data = manifest_bytes(checks)
        head = manifest.intact_head(open_storage(store_copy), checks)
    (store_copy / "manifest.json").write_bytes(data)
    (store_copy / "head.backup.tar").write_bytes(backup_bytes({**head, "manifest.json": data}))
    for arguments in (
        ("info", store_copy),
        ("verify", store_copy),
        ("repair", store_copy),
        ("compare", store_copy),
        ("statistics", store_copy, tmp_path / "stat.pt"),
        ("export", store_copy, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="format_version 2; expected 1, which this version"):
            call(*arguments)
    with pytest.raises(UserError, match="format_version 2"):
        LatentLoader(open_store(store_copy), batch_size=4)
    shutil.rmtree(store_copy / "latents")  # and a missing manifest does not make it readable
    (store_copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="format_version 2"):
        call("verify", store_copy)
