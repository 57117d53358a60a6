"""Decoder training in float64 on any number of ranks: what differs there does not come from rounding.

    python float64_run.py FIGURES.json key=value ...

Not a test: the tests start it. Every network and latent is converted; the figures of all steps go to FIGURES.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rae_fast.autoencoder import assembly, step, trainer
from rae_fast.autoencoder.batch import DecoderBatch
from rae_fast.config_file import load_config
from rae_fast.runtime import Ranks, init_distributed, ranks_from_environment


class Float64Encoder(assembly.LatentEncoder):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.encoder.double()
        self.encoder.options = replace(self.encoder.options, dtype=torch.float64)


def in_float64(build: Any) -> Any:
    return lambda *args, **kwargs: build(*args, **kwargs).double()


def main(target: Path, overrides: list[str], ranks: Ranks) -> None:
    for name in ("build_trainable", "build_backbone", "build_heads"):
        setattr(assembly, name, in_float64(getattr(assembly, name)))
    assembly.LatentEncoder = Float64Encoder
    config = load_config(None, overrides)
    device = torch.device("cpu")
    init_distributed(ranks, device)
    run = trainer.DecoderRun(config, ranks, device, Path(config.logging.run_folder))
    lines = []
    for number in range(run.total_steps):
        group = []
        for _ in range(run.batches.accumulation):
            batch = next(run.feed)
            group.append(
                DecoderBatch(batch.tokens_BNC.double(), batch.images_B3SS.double(), batch.index_B, batch.epoch)
            )
        figures = run.players.update(group, number, run.players.starts.phase(number))
        lines.append(dict(zip(step.FIGURES, figures.tolist(), strict=True)))
    assert all(master.dtype == torch.float64 for master in run.generator.shards.masters)
    run.close()
    if ranks.is_main:
        target.write_text(json.dumps(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], ranks_from_environment())
