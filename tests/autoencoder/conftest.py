from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rae_fast.config import Config

DECODER = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
OVERRIDES = (
    "stage_1.params.encoder_input_size=32",
    "stage_1.params.decoder_patch_size=8",
    "stage_1.params.noise_tau=0.3",
    "cache.precision=fp32",
    "data.threads=1",
    "eval.num_images=12",
    "training.global_batch_size=8",
    "training.max_steps=8",
    "training.log_interval=2",
    "training.sample_every=null",
    "training.checkpoint_interval=null",
    "training.optimizer.lr=2e-3",
    "training.ema_decay=0.9",
    "gan.disc.arch.recipe={depth: 1, embed_dim: 32, num_heads: 2, patch_size: 8, image_size: 32}",
    "gan.disc.arch.key_depths=[0]",
    "gan.disc.arch.ks=3",
    "gan.disc.augment.cutout=0.2",
    "gan.loss.perceptual=encoder",
    "gan.loss.perceptual_weight=0.5",
    "gan.loss.disc_weight=0.5",
    "gan.loss.disc_upd_start=0.4",
    "gan.loss.disc_start=0.8",
    "runtime.device=cpu",
    "runtime.precision=fp32",
    # DeepSpeed is met in the tests of several ranks; it takes seconds to import.
    "runtime.engine=ddp",
)


@pytest.fixture(scope="session")
def decoder_overrides(
    tiny_encoder: Path, image_folder: Path, pristine_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A small decoder with a random discriminator on the tiny store; both parts of the game start within 4 steps."""
    folder = tmp_path_factory.mktemp("decoder")
    sizes = {**DECODER, "decoder_intermediate_size": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(sizes))
    return [
        *OVERRIDES,
        f"stage_1.params.encoder_params.dinov2_path={tiny_encoder}",
        f"stage_1.params.decoder_config_path={folder}",
        f"data.source={image_folder}",
        f"data.val_source={image_folder}",
        f"cache.path={pristine_store}",
    ]


@pytest.fixture(scope="session")
def decoder_config(decoder_overrides: list[str]) -> Callable[..., Config]:
    """`decoder_config(run_folder, "key=value", ...)`."""
    from rae_fast.config_file import load_config  # imports OmegaConf, which GPU tests do without

    def make(folder: Path, *overrides: str) -> Config:
        return load_config(None, [*decoder_overrides, f"logging.run_folder={folder}", *overrides])

    return make
