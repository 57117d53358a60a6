from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log
from rae_fast.training.previews import COLUMNS, IMAGES, preview_labels

DDP = "runtime.engine=ddp"
GRIDS = ("training.sample_every=4", "training.max_steps=8", "sampler.params.num_steps=3", "training.cfg_scale=2.0")


def test_grids_at_fixed_noise_do_not_disturb_the_training(decoder, tiny_config, tmp_path):
    for run, overrides in (("with", (*decoder, *GRIDS)), ("without", ("training.max_steps=8",))):
        train_dit(tiny_config(tmp_path, DDP, *overrides, run=run))
    assert (tmp_path / "with/log.jsonl").read_bytes() == (tmp_path / "without/log.jsonl").read_bytes()
    names = sorted(path.name for path in (tmp_path / "with/samples").iterdir())
    assert names == ["step-0000004.png", "step-0000008.png"]
    first, second = (np.asarray(Image.open(tmp_path / "with/samples" / name)).astype(float) for name in names)
    rows = IMAGES // COLUMNS
    assert first.shape == (rows * 32 + (rows - 1) * 2, COLUMNS * 32 + (COLUMNS - 1) * 2, 3)
    assert first.std() > 1, "pictures, not a constant"
    # The same noise under weights four steps older: near, but not the same.
    assert 0 < np.abs(first - second).mean() < 20


def test_without_a_decoder_training_goes_on_and_says_so(tiny_config, tmp_path, capsys):
    train_dit(tiny_config(tmp_path, DDP, "training.sample_every=1", "training.max_steps=2"))
    assert "training without sample grids" in capsys.readouterr().out
    assert len(read_log(tmp_path / "run/log.jsonl")) == 2


def test_labels_spread_over_the_classes():
    assert preview_labels(1000).reshape(-1, COLUMNS)[:, 0].tolist() == [0, 250, 500, 750]
    assert preview_labels(1).max() == 0
    assert preview_labels(2).max() == 1


def test_online_training_has_the_interface_of_cached_training(tiny_config, image_folder, tmp_path):
    online = ("loader.source=online", f"data.source={image_folder}", "cache.precision=fp32", DDP)
    assert train_dit(tiny_config(tmp_path, *online, "training.max_steps=4"))["finished"]
    for steps in (3, 4):  # an epoch is two steps: interrupted in mid-epoch
        train_dit(tiny_config(tmp_path, *online, f"training.max_steps={steps}", run="again"))
    assert (tmp_path / "again/log.jsonl").read_bytes() == (tmp_path / "run/log.jsonl").read_bytes()


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_pairs_in_one_pass_train_the_same_run(path, tiny_config, tmp_path):
    shared = (DDP, f"transport.params.path_type={path}", "training.max_steps=3")
    found = []
    for kernels in ("torch", "triton"):
        train_dit(tiny_config(tmp_path, *shared, f"runtime.kernels={kernels}", run=kernels))
        found.append([line["loss"] for line in read_log(tmp_path / kernels / "log.jsonl")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
