from __future__ import annotations

import numpy as np
import pytest
import torch

from rae_fast.evaluation.frechet import frechet_distance
from rae_fast.geometry import resolve_geometry
from rae_fast.latents.store import open_store
from rae_fast.runtime import Ranks
from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.monitor import read_log
from rae_fast.training.online_evaluation import OnlineEvaluation

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


def test_distance_of_the_store_to_itself_is_zero_and_of_noise_is_not(tiny_config, tmp_path, pristine_store):
    config = tiny_config(tmp_path)
    store = open_store(pristine_store)
    evaluation = OnlineEvaluation(config, resolve_geometry(config), store, tmp_path, Ranks(), torch.device("cpu"))
    real = evaluation._moments(evaluation._stored())
    rows = np.flatnonzero(store.valid)
    pooled = store.denormalize(store.read(rows)).flatten(2).mean(2).double()
    assert np.allclose(real[0], pooled.mean(0), atol=1e-6)
    assert np.allclose(real[1], torch.cov(pooled.T), atol=1e-6)
    assert frechet_distance(*real, *real) == pytest.approx(0, abs=1e-6)
    noise = evaluation._moments(iter([evaluation.features(torch.randn(40, *store.latent_shape) * 3)]))
    assert frechet_distance(*real, *noise) > 1e-3
