"""A healthy pair of tiny runs: a DiT and a decoder on the session's store, trained until they know something."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rae_fast.autoencoder.trainer import train_decoder
from rae_fast.config_file import load_config
from rae_fast.training.dit_trainer import train_dit

SIZES = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
SHARED = (
    "stage_1.params.encoder_input_size=32",
    "stage_1.params.decoder_patch_size=8",
    "training.checkpoint_interval=null",
    "training.sample_every=null",
    "training.log_interval=20",
    "training.global_batch_size=16",
    "runtime.device=cpu",
    "runtime.precision=fp32",
    "runtime.engine=ddp",
)
DIT = (
    "stage_2.target=DiTDH",
    "stage_2.params={hidden_size: [32, 32], depth: [2, 1], num_heads: [2, 2], class_dropout_prob: 0.1}",
    "training.max_steps=160",
    "misc.time_dist_shift_base=512",
    "training.ema_decay=0.95",
    "training.optimizer.lr=4e-3",
)
DECODER = (
    "training.max_steps=120",
    "training.ema_decay=0.9",
    "training.optimizer.lr=4e-3",
    "stage_1.params.noise_tau=0",
    "gan.loss.perceptual_weight=0",
    "gan.loss.disc_weight=0",
)


@pytest.fixture(scope="session")
def healthy(tiny_encoder: Path, pristine_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `dit` and `decoder`; read only."""
    folder = tmp_path_factory.mktemp("healthy")
    (folder / "decoder.json").write_text(json.dumps(SIZES))
    shared = [
        *SHARED,
        f"stage_1.params.encoder_params.dinov2_path={tiny_encoder}",
        f"stage_1.params.decoder_config_path={folder / 'decoder.json'}",
        f"cache.path={pristine_store}",
    ]
    train_decoder(load_config(None, [*shared, *DECODER, f"logging.run_folder={folder / 'decoder'}"]))
    decoder = f"stage_1.params.pretrained_decoder_path={folder / 'decoder/export/model.pt'}"
    train_dit(load_config(None, [*shared, *DIT, decoder, f"logging.run_folder={folder / 'dit'}"]))
    return folder


@pytest.fixture
def run_copy(healthy: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the healthy DiT run that a test may spoil."""
    return lambda: Path(shutil.copytree(healthy / "dit", tmp_path / "dit"))
