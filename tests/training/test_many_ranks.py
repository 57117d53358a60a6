from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rae_fast.runtime import Ranks

from . import rank_worker

KINDS = ("ddp", "zero-0", "zero-1", "zero-2", "zero-3")


def launch(ranks: int, jobs: list[dict], folder: Path) -> list[dict]:
    """Run the worker on several ranks of this machine and return rank 0's findings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, str(Path(__file__).with_name("rank_worker.py"))]
        command += [str(folder / "jobs.json"), str(folder / "found.json")]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return json.loads((folder / "found.json").read_text())


def here(jobs: list[dict]) -> list[dict]:
    """Run jobs on one rank, in this process."""
    torch.set_num_threads(1)
    return [rank_worker.run(one, Ranks(), torch.device("cpu")) for one in jobs]


def job(kind: str, first: int, last: int, source: Path | None = None, target: Path | None = None) -> dict:
    return {
        "kind": kind,
        "first": first,
        "last": last,
        "from": source and str(source),
        "to": target and str(target),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """Six undisturbed steps of every kind, and nine steps as 1 -> 2 -> 1 ranks under three ZeRO stages."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = folder / "one", folder / "two"
    alone = here([job("zero-1", 0, 9), job("zero-1", 0, 3, None, one)])
    jobs = [job(kind, 0, 6) for kind in KINDS]
    jobs += [job("zero-1", 0, 3, None, folder / "saved"), job("zero-1", 3, 6, folder / "saved")]
    jobs += [job("zero-3", 3, 6, one, two)]
    pair = launch(2, jobs, folder)
    back = here([job("zero-2", 6, 9, two)])
    found = {"alone": alone[0], "alone_first": alone[1], **dict(zip(KINDS, pair, strict=False))}
    return {**found, "resumed": pair[6], "saved": pair[5], "pair_middle": pair[7], "alone_last": back[0]}


def close(a: list[float], b: list[float], tolerance: float) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_has_the_losses_of_one_rank(kind, found):
    assert close(found[kind]["losses"], found["alone"]["losses"][:6], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_ends_with_the_same_weights_and_ema(kind, found):
    assert close(found[kind]["weights"], found["ddp"]["weights"], 1e-5)
    assert close(found[kind]["ema"], found["ddp"]["ema"], 1e-5)


def test_resume_on_the_same_ranks_is_bit_identical(found):
    assert found["saved"]["losses"] + found["resumed"]["losses"] == found["zero-1"]["losses"]
    assert found["resumed"]["weights"] == found["zero-1"]["weights"]
    assert found["resumed"]["ema"] == found["zero-1"]["ema"]


def test_one_then_two_then_one_rank_continue_the_run_under_other_zero_stages(found):
    losses = [*found["alone_first"]["losses"], *found["pair_middle"]["losses"], *found["alone_last"]["losses"]]
    assert close(losses, found["alone"]["losses"], 1e-5)
    assert close(found["alone_last"]["ema"], found["alone"]["ema"], 1e-5)


@pytest.mark.slow
def test_four_ranks_agree_with_one(tmp_path, found):
    four = launch(4, [job(kind, 0, 6) for kind in KINDS], tmp_path)
    for run in four:
        assert close(run["losses"], found["alone"]["losses"][:6], 1e-5)
