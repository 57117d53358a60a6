"""Tests of the XLA path on torch_xla's CPU device; `make test-xla` has the environment for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rae_fast.config import Config
from rae_fast.config_file import load_config

os.environ.setdefault("PJRT_DEVICE", "CPU")
# Compiling is all that these tests wait for, and the compiler's own optimizations are four fifths of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
pytest.importorskip("torch_xla", reason="torch_xla is not installed; make test-xla")

RUN = """
stage_1:
  params: {encoder_cls: Dinov2withNorm, encoder_input_size: 32, decoder_patch_size: 8}
stage_2:
  target: DiTDH
  params: {hidden_size: [32, 48], depth: [1, 1], num_heads: [2, 2], class_dropout_prob: 0.1}
transport: {params: {time_dist_type: logit-normal_0_1}}
training:
  max_steps: 6
  global_batch_size: 16
  ema_decay: [0.9, power_0.1]
  log_interval: 1
  checkpoint_interval: null
  checkpoint_every: 3
  sample_every: null
  clip_grad: 0.5
  global_seed: 3
  optimizer: {lr: 1.0e-3, weight_decay: 0.1, decay_norms_and_biases: false}
  scheduler: {type: cosine, warmup_steps: 2, warmup_from_zero: true, decay_end_steps: 12, final_lr: 1.0e-4}
runtime: {precision: fp32, engine: ddp}
"""


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """Made before anything trains on the CPU: autograd starts its threads once, for the devices that it finds then."""
    from rae_fast.runtime import pick_device

    return pick_device("xla")


@pytest.fixture(scope="session")
def run_arguments(tiny_encoder: Path, pristine_store: Path) -> Callable[..., list[str]]:
    """`run_arguments(folder, "key=value", ...)`: what a training tool is called with to train in `folder`."""

    def make(folder: Path, *overrides: str) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(RUN)
        paths = {
            "stage_1.params.encoder_params.dinov2_path": tiny_encoder,
            "cache.path": pristine_store,
            "logging.run_folder": folder / "run",
        }
        return ["--config", str(config), *(f"{key}={value}" for key, value in paths.items()), *overrides]

    return make


@pytest.fixture(scope="session")
def run_config(run_arguments: Callable[..., list[str]]) -> Callable[..., Config]:
    """As `run_arguments`, loaded."""

    def make(folder: Path, *overrides: str) -> Config:
        _, path, *rest = run_arguments(folder, *overrides)
        return load_config(path, rest)

    return make
