"""Where weights, config, statistics and class names come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.latents.stats import save_statistics
from rae_fast.latents.store import open_store
from rae_fast.runtime import Ranks
from rae_fast.sampling import load_sampler
from rae_fast.sampling.classes import known_names
from rae_fast.sampling.job import SamplingJob, run_sampling
from rae_fast.sampling.source import newest_weights, open_decoder, open_source
from rae_fast.training.dit_trainer import train_dit
from rae_fast.training.export import checkpoint_weights

from .conftest import DECODER, DIT, SIZES, randomize

CPU = torch.device("cpu")
TRAINING = [
    "stage_2.target=DiTDH",
    *(f"stage_2.params.{key}={value}" for key, value in DIT.items()),
    "training.global_batch_size=16",
    "training.ema_decay=[0.9,0.5]",
    "training.checkpoint_interval=null",
    "training.checkpoint_every=2",
    "training.sample_every=null",
    "sampler.params.num_steps=3",
    "runtime.engine=ddp",
    "runtime.precision=fp32",
]


@pytest.fixture(scope="module")
def trained(
    cache_config: Callable[..., Config], pristine_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a run of four steps, exported, on a store of three classes whose number its config leaves open."""
    folder = tmp_path_factory.mktemp("runs") / "dit"
    train_dit(cache_config(pristine_store, *TRAINING, "training.max_steps=4", f"logging.run_folder={folder}"))
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a random decoder for the store's latents."""
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "decoder.json").write_text(json.dumps(DECODER))
    model = ViTDecoder(replace(load_decoder_config(folder / "decoder.json"), hidden_size=32, grid=4, patch_size=8))
    randomize(model, 0)
    torch.save(model.state_dict(), folder / "model.pt")
    return [
        f"stage_1.params.decoder_config_path={folder / 'decoder.json'}",
        f"stage_1.params.pretrained_decoder_path={folder / 'model.pt'}",
    ]


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return load_sampler(config, resolve_geometry(config), CPU).model.state_dict()


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_run_gives_its_config_its_average_and_its_classes(trained: Path) -> None:
    config = open_source(None, trained, None)
    assert config.sampler.params.num_steps == 3 and config.misc.num_classes == 3
    assert equal(weights_of(config), checkpoint_weights(trained / "checkpoints", ema="0.9"))
    assert open_source(None, trained, None, ["sampler.params.num_steps=5"]).sampler.params.num_steps == 5


def test_an_interrupted_run_gives_its_newest_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "export")
    config = open_source(None, run, None)
    assert config.stage_2.ckpt == str(run / "checkpoints") and config.misc.num_classes == 3
    assert equal(weights_of(config), checkpoint_weights(trained / "checkpoints", ema="0.9"))


def test_a_checkpoint_newer_than_the_export_is_taken(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "checkpoints/step-0000002").rename(run / "checkpoints/step-0000006")
    (run / "checkpoints/latest").write_text("step-0000006\n")
    assert newest_weights(run) == run / "checkpoints"
    assert newest_weights(trained) == trained / "export/stage2_model.pt"


def test_any_average_of_a_run_can_be_asked_for(trained: Path) -> None:
    assert open_source(None, trained, None, ema="0.5").stage_2.ckpt == str(trained / "export/ema-0.5.safetensors")
    config = open_source(None, trained, None, ema="online")
    model = load_sampler(config, resolve_geometry(config), CPU, ema="online").model
    assert equal(model.state_dict(), checkpoint_weights(trained / "checkpoints", ema="online"))
    with pytest.raises(UserError, match=r"no EMA 0\.7"):
        load_sampler(config, resolve_geometry(config), CPU, ema="0.7")


def test_an_export_knows_its_run(trained: Path) -> None:
    config = open_source(None, None, trained / "export/ema-0.5.safetensors")
    assert equal(weights_of(config), checkpoint_weights(trained / "checkpoints", ema="0.5"))


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
def test_an_official_config_with_a_checkpoint_or_an_export(
    model_files: Path, settings: list[str], tmp_path: Path, name: str
) -> None:
    from safetensors.torch import save_file

    tensors = torch.load(model_files / "dit.pt")
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save({"step": 1, "model": {}, "ema": {f"module.{k}": v for k, v in tensors.items()}}, path)
    else:
        save_file(tensors, path)
    left_open = [entry for entry in settings if not entry.startswith(("stage_2.ckpt", "misc.num_classes"))]
    (tmp_path / "official.yaml").write_text(f"""
stage_2:
  target: stage2.models.DDT.DiTwDDTHead
  ckpt: {path}
guidance: {{method: cfg, scale: 1.5, t-min: 0.1, t-max: 0.9}}
""")
    config = open_source(str(tmp_path / "official.yaml"), None, None, left_open)
    assert config.misc.num_classes == SIZES["num_classes"] and config.guidance.t_min == 0.1
    assert equal(weights_of(config), tensors)


def test_sources_that_are_none_are_refused(trained: Path, tmp_path: Path, settings: list[str]) -> None:
    for arguments, message in (
        ((None, tmp_path, None), "has no config.yaml"),
        (("a.yaml", trained, None), "--run together with --config"),
        ((None, trained, tmp_path / "nowhere.pt"), "nowhere.pt does not exist"),
        ((None, None, None), "stage_2.ckpt is not set"),
        ((None, trained, None, ["sampler.params.num_step=5"]), "did you mean 'num_steps'"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(*arguments)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        open_source(None, tmp_path, None)


# --- decoder and statistics -----------------------------------------------------------------------------------------


def test_a_run_s_latents_are_denormalized_by_its_store(
    trained: Path, decoder: list[str], pristine_store: Path, tmp_path: Path
) -> None:
    config = open_source(None, trained, None, decoder)
    store = open_store(str(pristine_store))
    rae = open_decoder(config, CPU)
    assert torch.equal(rae.latent_mean, store.mean) and torch.equal(rae.latent_var, store.var)
    run_sampling(config, SamplingJob(tmp_path / "samples", np.arange(3)), Ranks())
    assert len(list((tmp_path / "samples/images").glob("*.png"))) == 3


def test_statistics_that_contradict_the_store_are_refused(
    trained: Path, decoder: list[str], pristine_store: Path, tmp_path: Path
) -> None:
    store, path = open_store(str(pristine_store)), tmp_path / "stat.pt"
    given = [*decoder, f"stage_1.params.normalization_stat_path={path}"]
    save_statistics(path, store.mean, store.var)
    assert torch.equal(open_decoder(open_source(None, trained, None, given), CPU).latent_mean, store.mean)
    save_statistics(path, store.mean + 0.1, store.var)
    with pytest.raises(UserError, match="`mean` is not that of the store"):
        open_decoder(open_source(None, trained, None, given), CPU)
    without = open_decoder(open_source(None, trained, None, [*given, "cache.path=null"]), CPU)
    assert torch.equal(without.latent_mean, store.mean + 0.1)


def test_a_store_that_is_gone_or_a_decoder_that_was_never_named_is_refused(trained: Path, decoder: list[str]) -> None:
    with pytest.raises(UserError, match="statistics are unknown"):
        open_decoder(open_source(None, trained, None, [*decoder, "cache.path=nowhere"]), CPU)
    with pytest.raises(UserError, match="pretrained_decoder_path is not set"):
        open_decoder(open_source(None, trained, None), CPU)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_are_the_store_s_and_imagenet_s(trained: Path) -> None:
    assert known_names(open_source(None, trained, None), 3) == [("circle", "square", "triangle")]
    (imagenet,) = known_names(load_config(None, []), 1000)
    assert (imagenet[207], imagenet[360]) == ("golden retriever", "otter")
