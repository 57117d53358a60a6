"""What each rank of the multi-rank tests runs: the jobs of a JSON file, one after the other.

A job trains the conftest's regression on a fixed global batch: {"kind": "zero-1", "from": folder or null, "first": 0,
"last": 6, "to": folder or null}. Rank 0 writes the losses of each job.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from rae_fast.config import Optimizer, Runtime
from rae_fast.runtime import Ranks, init_distributed, ranks_from_environment
from rae_fast.training.checkpoint import Checkpointer
from rae_fast.training.engine import Engine

specification = importlib.util.spec_from_file_location("training_conftest", Path(__file__).with_name("conftest.py"))
conftest = importlib.util.module_from_spec(specification)
specification.loader.exec_module(conftest)

STEPS = 9  # of the longest job; all jobs see the same batches


def run(job: dict, ranks: Ranks, device: torch.device) -> dict[str, list[float]]:
    """Train as the job says and return losses and fingerprints of the weights."""
    engine_name, _, stage = job["kind"].partition("-")
    # Ranks begin with different weights: what they train must come from rank 0 all the same.
    engine = Engine(
        conftest.regression(seed=ranks.rank),
        optimizer=Optimizer(lr=1e-2, weight_decay=0.1, decay_norms_and_biases=False),
        lr=lambda step: 1e-2 / (1 + step),
        ranks=ranks,
        device=device,
        runtime=Runtime(engine="ddp" if engine_name == "ddp" else "deepspeed", precision="fp32"),
        deepspeed={"zero_optimization": {"stage": int(stage or 0)}},
        accumulation=2,
        clip_grad=0.5,
        ema_decays=[0.9, 0.5],
    )
    if job["from"]:
        state = Checkpointer(Path(job["from"]), ranks).restore({"model": engine})
        assert state["step"] == engine.steps == job["first"], (state, engine.steps)
    x, y = conftest.batches(STEPS, 16)
    losses = []
    for step in range(job["first"], job["last"]):
        conftest.train_step(engine, x[step, ranks.rank :: ranks.world], y[step, ranks.rank :: ranks.world])
        losses.append(engine.record[0].item())
    weights, average = engine.weights(), engine.ema_weights(0.9)
    if job["to"]:
        checkpointer = Checkpointer(Path(job["to"]), ranks)
        checkpointer.save(engine.steps, {"model": engine}, {"by": job["kind"]})
        checkpointer.wait()
    engine.close()
    facts = {"weights": fingerprint(weights), "ema": fingerprint(average)}
    return {"losses": losses, **facts}


def fingerprint(weights: dict[str, torch.Tensor]) -> list[float]:
    """Figures that two equal sets of weights share."""
    return [value.double().square().sum().item() for value in weights.values()]


def main() -> None:
    torch.set_num_threads(1)
    ranks, device = ranks_from_environment(), torch.device("cpu")
    init_distributed(ranks, device)
    found = [run(job, ranks, device) for job in json.loads(Path(sys.argv[1]).read_text())]
    if ranks.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
