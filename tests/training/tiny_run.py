"""The smallest real training run: a DiTDH of width 32 on the session's store of 40 encoded JPEGs."""

from __future__ import annotations

from pathlib import Path

from rae_fast.config import Config
from rae_fast.config_file import load_config

IMAGES, SHAPE, CLASSES = 40, (32, 4, 4), 3
STEPS_PER_EPOCH = 2  # 40 images cut to 32, 16 a step

CONFIG = """
stage_1:
  params: {encoder_cls: Dinov2withNorm, encoder_input_size: 32, decoder_patch_size: 8}
stage_2:
  target: DiTDH
  params: {hidden_size: [32, 32], depth: [2, 1], num_heads: [2, 2], class_dropout_prob: 0.1}
transport: {params: {time_dist_type: logit-normal_0_1}}
training:
  max_steps: 12
  global_batch_size: 16
  ema_decay: [0.9, 0.5]
  log_interval: 1
  checkpoint_interval: null
  checkpoint_every: 4
  sample_every: null
  global_seed: 3
  optimizer: {lr: 1.0e-3}
  scheduler: {type: cosine, warmup_steps: 2, warmup_from_zero: true, decay_end_steps: 12, final_lr: 1.0e-4}
runtime: {device: cpu, precision: fp32}
"""


def write_config(folder: Path, encoder: Path, store: Path, run: str = "run") -> list[str]:
    """Write `folder`/config.yaml; the arguments of a tool that trains by it into `folder`/`run`."""
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    return [
        "--config",
        str(path),
        f"stage_1.params.encoder_params.dinov2_path={encoder}",
        f"cache.path={store}",
        f"logging.run_folder={folder / run}",
    ]


def make_config(folder: Path, encoder: Path, store: Path, *overrides: str, run: str = "run") -> Config:
    """The config of a run in `folder`/`run`."""
    _, path, *shared = write_config(folder, encoder, store, run)
    return load_config(path, [*shared, *overrides])
