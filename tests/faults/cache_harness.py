"""Builds in processes of their own that die where a test wants them to.

A fork server that has imported everything once starts a rank in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

from rae_fast.config import Config

PRELOAD = ["rae_fast.latents.writer", "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"]


def start_ranks(
    config: Config, world: int = 1, die_at: int | None = None, by: int = signal.SIGKILL
) -> list[BaseProcess]:
    """Start a build of `world` ranks; each sends itself the signal `by` at its `die_at`-th file put in place."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=run_rank, args=(config, rank, world, port, die_at, by)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def run_rank(config: Config, rank: int, world: int, port: int, die_at: int | None, by: int) -> None:
    """Body of a rank: exit status 0 complete, 2 user error, 143 stopped."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    from rae_fast.errors import exit_cleanly
    from rae_fast.latents.writer import Stopped, build_cache
    from rae_fast.runtime import ranks_from_environment

    if die_at is not None:
        _die_at(die_at, by)

    def main() -> int:
        try:
            build_cache(config, ranks_from_environment())
        except Stopped:
            return 143
        return 0

    exit_cleanly(main)


def _die_at(count: int, by: int) -> None:
    """Signal this process at its `count`-th rename: before it when odd, right after it when even."""
    replace, calls = Path.replace, [0]

    def counting(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == count and count % 2:
            os.kill(os.getpid(), by)
        result = replace(self, target)
        if calls[0] == count and count % 2 == 0:
            os.kill(os.getpid(), by)
        return result

    Path.replace = counting  # type: ignore[method-assign]


def finish(ranks: list[BaseProcess], timeout_s: float = 600) -> list[int | None]:
    """Wait for all ranks; like a launcher, end the others once one has died."""
    for _ in range(int(timeout_s / 0.05)):
        codes = [rank.exitcode for rank in ranks]
        if all(code is not None for code in codes):
            return codes
        if any(code not in (None, 0) for code in codes):
            kill(ranks)
        ranks[next(i for i, code in enumerate(codes) if code is None)].join(0.05)
    kill(ranks)
    raise TimeoutError(f"a build hung for {timeout_s} s")


def kill(ranks: list[BaseProcess]) -> None:
    """SIGKILL every rank."""
    for rank in ranks:
        rank.kill()
        rank.join()
