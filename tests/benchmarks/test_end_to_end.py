"""The three ways: the reference's step does what its design says, and break-even follows from rates and build."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from rae_fast.config import Config
from rae_fast.geometry import resolve_geometry
from rae_fast.images.crop import center_crop_pil


@pytest.fixture
def ends(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("end_to_end")


def test_break_even_is_where_the_build_is_paid_for(ends: ModuleType) -> None:
    reference = {"marks": [(100, 12.0), (300, 32.0)], "build_s": 0.0}  # 10 images/s after the first epoch
    cached = {"marks": [(100, 9.0), (300, 13.0)], "build_s": 8.0}  # 50 images/s
    assert ends.steady_rate(reference) == 10
    epochs = ends.break_even(reference, cached, 100)
    assert 8.0 + epochs * 100 / 50 == pytest.approx(epochs * 100 / 10)
    assert ends.break_even(cached, reference, 100) == float("inf")


def test_result_has_rates_ratios_build_memory_and_a_plot(ends: ModuleType, tmp_path: Path) -> None:
    def run(rate: float, build_s: float) -> dict:
        marks = [(100, build_s + 100 / rate), (200, build_s + 200 / rate)]
        split = {"decode": 5.0, "encode": 1.0, "train": 2.0}
        times = {"marks": marks, "cpu_s": 4 / rate, "steady_cpu_s": 2 / rate}
        return {**times, "build_s": build_s, "peak_bytes": 5e8, "split_ms": split}

    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text(json.dumps({"patch_size": 14, "hidden_size": 48}))
    args = Namespace(device="cpu", batch=10, epochs=2, workers=1, images=100)
    ways = {"reference": [run(10, 0), run(12, 0)], "online": [run(20, 0)] * 2, "cached": [run(50, 4), run(48, 4)]}
    result = ends.report({"S-like": ways}, tmp_path, args)
    assert [row["ratio_to_reference"] for row in result["rows"]] == [1.0, pytest.approx(1.833), 4.5]
    assert [row["ratio_by_cpu_time"] for row in result["rows"]][2] == pytest.approx(4.5)
    assert result["rows"][2]["first_epoch_s"] == pytest.approx(6.04, abs=0.01)
    assert result["rows"][2]["peak_mb"] == 500
    assert result["summary"]["S-like"]["break_even_epoch"] == pytest.approx((4 / 8 + 4 / 6.25) / 2, rel=1e-3)
    assert result["split_ms_reference"]["S-like"]["decode"] == 5.0
    assert result["summary"]["S-like"]["cached_at_most"] == 4.0  # (5 + 1 + 2) / 2
    cores = ends.default_threads()
    assert result["summary"]["S-like"]["core_ms_cached"] == pytest.approx(cores * 1e3 * (1 / 50 + 1 / 48) / 2, rel=1e-3)
    assert result["summary"]["S-like"]["core_ms_reference"] == pytest.approx(cores * (1e2 + 1e3 / 12) / 2, rel=1e-3)
    ends.plot({"S-like": ways}, args, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_scaled_models_keep_the_shares_of_the_released_ones(ends: ModuleType, tmp_path: Path) -> None:
    """Encoding is 16 % of training DiTDH-S and 5 % of DiTDH-XL, in FLOPs."""
    shares = {}
    for device, models in ends.MODELS.items():
        width = ends.ENCODERS[device]["hidden_size"]
        for model in models:
            settings = {"workers": 1, "batch": 8, "epochs": 2}
            config = ends.make_config(tmp_path, model, device, settings, f"stage_2.params.in_channels={width}")
            geometry = resolve_geometry(config)
            assert geometry.image_size == 256
            shares[model] = ends.encoder_flops(config, geometry, depth=ends.ENCODERS[device]["num_hidden_layers"])
            shares[model] /= ends.training_flops(ends.from_config(config))
    assert shares["DiTDH-S"] == pytest.approx(0.162, abs=0.002)
    assert shares["S-like"] == pytest.approx(shares["DiTDH-S"], abs=0.02)
    assert shares["XL-like"] == pytest.approx(shares["DiTDH-XL"], abs=0.01)


def test_reference_way_trains_on_the_references_crops(
    script: Callable[[str], ModuleType], cache_config: Callable[..., Config], tmp_path: Path, image_folder: Path
) -> None:
    whole = tmp_path / "images"
    shutil.copytree(image_folder, whole)
    (whole / "square/013.jpg").unlink()
    torch.save({"mean": torch.zeros(1), "var": torch.ones(1)}, tmp_path / "stat.pt")
    overrides = (
        f"data.source={whole}",
        f"cache.statistics={tmp_path / 'stat.pt'}",
        "misc.num_classes=3",
        "stage_2.target=DiTDH",
        "stage_2.params.hidden_size=[32,32]",
        "stage_2.params.depth=[1,1]",
        "stage_2.params.num_heads=[2,2]",
        "training.global_batch_size=8",
        "training.ema_decay=0.5",
    )
    config = cache_config(tmp_path / "none", *overrides)
    module = script("reference_way")
    trainer = module.ReferenceTrainer(config, resolve_geometry(config), torch.device("cpu"), 0, "fp32", False)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    assert trainer.steps_per_epoch == 5 and trainer.train(5) == 40
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    last, online = (model.final_layer.linear.weight for model in (trainer.average, trainer.model))
    assert not torch.equal(last, online)
    crop = module.FlippedCrop(32)
    path, _ = ImageFolder(str(whole)).samples[0]
    with Image.open(path) as image:
        expected = torch.from_numpy(np.array(center_crop_pil(image.convert("RGB"), 32))).permute(2, 0, 1)
        seen = [crop(image.convert("RGB")) for _ in range(12)]
    assert any(torch.equal(s, expected) for s in seen)
    assert any(torch.equal(s, expected.flip(-1)) for s in seen)
    assert all(torch.equal(s, expected) or torch.equal(s, expected.flip(-1)) for s in seen)
