from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from rae_fast.errors import UserError
from rae_fast.evaluation.frechet import StreamingMoments, frechet_distance
from rae_fast.evaluation.image_sets import open_images
from rae_fast.evaluation.images import save_npz
from rae_fast.latents.store import open_store
from rae_fast.runtime import Ranks
from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log
from rae_fast.training.online_evaluation import latent_measure, spread_labels

DDP = "runtime.engine=ddp"
EVALUATE = ("eval.eval_interval=3", "eval.num_images=12", "eval.eval_model=true", "sampler.params.num_steps=3")


def test_evaluation_does_not_disturb_the_training_and_survives_interruption(tiny_config, tmp_path):
    train_dit(tiny_config(tmp_path, DDP, "training.max_steps=6", run="without"))
    train_dit(tiny_config(tmp_path, DDP, *EVALUATE, "training.max_steps=6"))
    assert (tmp_path / "run/log.jsonl").read_bytes() == (tmp_path / "without/log.jsonl").read_bytes()
    lines = read_log(tmp_path / "run/eval.jsonl")
    assert [(line["step"], line["weights"]) for line in lines] == [(s, w) for s in (3, 6) for w in ("ema", "online")]
    assert all(line["fd_latent"] > 0 and line["generated"] == 12 for line in lines)
    assert lines[2]["fd_latent"] != lines[3]["fd_latent"], "EMA and online weights differ"
    for steps in (4, 6):
        train_dit(tiny_config(tmp_path, DDP, *EVALUATE, f"training.max_steps={steps}", run="again"))
    assert (tmp_path / "again/eval.jsonl").read_bytes() == (tmp_path / "run/eval.jsonl").read_bytes()


def test_evaluation_with_guidance_differs_from_that_without(tiny_config, tmp_path):
    found = []
    for scale in (1.0, 3.0):
        guided = (f"training.cfg_scale={scale}", "training.optimizer.lr=0.01", "training.max_steps=3")
        train_dit(tiny_config(tmp_path, DDP, *EVALUATE, *guided, run=f"scale-{scale}"))
        found.append(read_log(tmp_path / f"scale-{scale}/eval.jsonl")[0]["fd_latent"])
    assert found[0] != found[1]


@pytest.mark.parametrize(("count", "classes", "found"), [(6, 3, [2, 2, 2]), (4, 3, [2, 1, 1]), (2, 4, [1, 0, 1, 0])])
def test_labels_are_spread_over_the_classes_whatever_their_number(count, classes, found):
    assert np.bincount(spread_labels(count, classes), minlength=classes).tolist() == found


def test_distance_of_the_store_to_itself_is_zero_and_of_noise_is_not(pristine_store):
    store = open_store(pristine_store)
    measure = latent_measure(store, Ranks(), torch.device("cpu"))
    real = measure.reference()
    rows = np.flatnonzero(store.valid)
    pooled = store.denormalize(store.read(rows)).flatten(2).mean(2).double()
    assert np.allclose(real[0], pooled.mean(0), atol=1e-6)
    assert np.allclose(real[1], torch.cov(pooled.T), atol=1e-6)
    assert frechet_distance(*real, *real) == pytest.approx(0, abs=1e-6)
    noise = StreamingMoments(measure.dim)
    noise.update(measure.features(torch.randn(40, *store.latent_shape) * 3))
    assert frechet_distance(*real, *noise.finish()) > 1e-3


def test_decoded_samples_are_compared_with_images_by_the_evaluation_tools_features(
    decoder, tiny_config, image_folder, tmp_path, monkeypatch
):
    (tmp_path / "brightness.py").write_text("def quarters(x):\n    return x.unfold(2, 16, 16).mean((1, 2, 4))\n")
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "images"
    shutil.copytree(image_folder, whole)
    (whole / "square/013.jpg").unlink()  # the truncated one
    pixels = (f"eval.reference_npz_path={whole}", "eval.features=brightness:quarters")
    train_dit(tiny_config(tmp_path, DDP, *EVALUATE, *decoder, *pixels, "training.max_steps=3"))
    lines = read_log(tmp_path / "run/eval.jsonl")
    assert all(line["fd"] > 0 and line["fd_latent"] > 0 for line in lines)
    # The same images as .npz are the same reference.
    crops = open_images(str(whole), 32)
    save_npz(tmp_path / "images.npz", np.concatenate(list(crops.pieces(0, crops.count))))
    as_file = (f"eval.reference_npz_path={tmp_path / 'images.npz'}", pixels[1])
    train_dit(tiny_config(tmp_path, DDP, *EVALUATE, *decoder, *as_file, "training.max_steps=3", run="npz"))
    assert [line["fd"] for line in read_log(tmp_path / "npz/eval.jsonl")] == pytest.approx([e["fd"] for e in lines])


def test_statistics_of_another_network_are_refused_before_the_first_step(decoder, tiny_config, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    pixels = (f"eval.reference_npz_path={tmp_path / 'statistics.npz'}", "eval.features=encoder")
    with pytest.raises(UserError, match=r"holds no images, and eval\.features is encoder"):
        train_dit(tiny_config(tmp_path, DDP, *EVALUATE, *decoder, *pixels))
    assert not (tmp_path / "run/log.jsonl").exists()
