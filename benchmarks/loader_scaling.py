"""How many samples/s do 1, 2 and 4 ranks read together: from a disk, from memory, from an object store on the loopback?

    python benchmarks/loader_scaling.py
    python benchmarks/loader_scaling.py --images 4096 --ranks 1 2 4 8 --folder /mnt/nvme

Each rank is a process with the training loader over the same store of latents [768, 16, 16] in float16, checksums
verified, decoded to float32. Besides reading alone, whole steps are timed, for benchmarks/simulate.py: the next batch,
a pause in the place of a GPU's work (so that ranks do not fight for this machine's cores), an all-reduce of gradients
over gloo; once with stragglers. The object store is moto's S3 server, one Python process: what it shows is that nothing
but the storage is slow. On a machine with fewer cores than ranks, reading scales no further than the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import RESULTS, make_result, print_table, row, write_result

from rae_fast.config_file import load_config
from rae_fast.errors import UserError, exit_cleanly
from rae_fast.latents.imports import import_latents
from rae_fast.latents.loader import LatentLoader
from rae_fast.latents.storage import open_storage
from rae_fast.latents.store import open_store
from rae_fast.runtime import Ranks, init_distributed, ranks_from_environment

SHAPE = (768, 16, 16)
PREFETCH = 4
SHARD = 32  # moto copies a whole object for each range of it that is read
S3_SHARE = 8
PAUSE_S = 0.05
GRADIENT_VALUES = 1 << 20  # 4 MiB
TIMES = ("load_s", "exchange_s", "compute_s", "step_s")
STRAGGLER = (0.1, 3.0)  # probability, and how many times as long


def main() -> None:
    """Parse the command line; as a rank measure, else start ranks and collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the local store is made (and removed)")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="samples of a rank's batch; an eighth for s3")
    parser.add_argument("--batches", type=int, default=24, help="batches of a rank, of one measurement")
    parser.add_argument("--steps", type=int, default=40, help="steps of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--storage", nargs="+", choices=("local", "tmpfs", "s3"), default=["local", "tmpfs", "s3"])
    parser.add_argument("--out", type=Path, default=RESULTS / "loader_scaling.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        work(json.loads(args.worker))
        return
    if args.images < args.batch * max(args.ranks):
        raise UserError(f"--images {args.images}", f"a batch for each rank: {args.batch * max(args.ranks)}")
    with ExitStack() as stack:
        stores = dict(make_stores(args, stack))
        points = [point for _ in range(args.rounds) for point in one_round(stores, args)]
    result = report(merge(points), args)
    print_table(result)
    write_result(args.out, result)


# --- stores ---------------------------------------------------------------------------------------------------------


def make_stores(args: argparse.Namespace, stack: ExitStack) -> Iterator[tuple[str, str]]:
    """The same store in every storage that can be had here: (storage, URL)."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-scaling-", dir=args.folder)))
    source = folder / "npy"
    source.mkdir()
    random = np.random.default_rng(0)
    array = np.lib.format.open_memmap(source / "latents.npy", "w+", np.float16, (args.images, *SHAPE))
    for i in range(args.images):
        array[i] = random.standard_normal(SHAPE, np.float32)
    array.flush()
    del array
    settings = ("cache.statistics=none", f"cache.shard_size={SHARD}", f"cache.path={folder / 'store'}")
    import_latents(source, load_config(None, settings))
    shutil.rmtree(source)
    if "local" in args.storage:
        yield "local", str(folder / "store")
    if "tmpfs" in args.storage:
        memory = Path("/dev/shm")
        if memory.is_dir():
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-scaling-", dir=memory)))
            yield "tmpfs", str(shutil.copytree(folder / "store", place / "store"))
        else:
            print("tmpfs is left out: there is no /dev/shm")
    if "s3" in args.storage:
        try:
            url = stack.enter_context(object_store())
        except ImportError as error:
            print(f"s3 is left out: {error}")
        else:
            copy_store(str(folder / "store"), url)
            yield "s3", url


@contextmanager
def object_store() -> Iterator[str]:
    """URL of an empty bucket of moto's server on the loopback, a process of its own."""
    import moto.server  # noqa: F401
    import s3fs

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        await_port(port)
        s3fs.S3FileSystem().mkdir("latents")
        yield "s3://latents/store"
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def await_port(port: int, timeout_s: float = 60.0) -> None:
    """Wait until somebody listens."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise UserError(f"no server on port {port} after {timeout_s:g} s", "moto's server")


def copy_store(source: str, target: str) -> None:
    """Every file of a store to another place."""
    before, after = open_storage(source), open_storage(target)
    for key in before.list():
        after.write(key, before.read(key))


# --- ranks ----------------------------------------------------------------------------------------------------------


def one_round(stores: dict[str, str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every storage on every number of ranks, in turn; processes start once for each number of ranks."""
    for ranks in args.ranks:
        jobs = []
        for storage, url in stores.items():
            # One Python process serves the object store: smaller batches, or it takes longer than all the rest.
            batch = max(1, args.batch // S3_SHARE) if storage == "s3" else args.batch
            job = {"storage": storage, "url": url, "batch": batch, "batches": args.batches, "steps": args.steps}
            jobs.append({**job, "straggling": storage == "local" and ranks > 1})
        yield from launch(ranks, jobs)
        print(f"{ranks} ranks: done", flush=True)


def launch(ranks: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Start ranks that do these jobs, wait, and read what rank 0 says.

    Raises:
        UserError: a rank failed.
    """
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, __file__, "--worker", json.dumps(jobs)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    answers = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode:
            raise UserError(f"a rank failed: {errors.strip().splitlines()[-1:]}", "ranks without an error")
    return json.loads(answers[0][0].splitlines()[-1])


def work(jobs: list[dict[str, Any]]) -> None:
    """One rank; rank 0 prints the points of all jobs."""
    ranks = ranks_from_environment()
    init_distributed(ranks, torch.device("cpu"))
    points = [point for job in jobs for point in measure(job, ranks)]
    if ranks.is_main:
        print(json.dumps(points))


def measure(job: dict[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    """Points of one storage: reading alone, the exchange alone, steps."""
    gradients = torch.ones(GRADIENT_VALUES)

    def exchange() -> None:
        if ranks.world > 1:
            torch.distributed.all_reduce(gradients)
            gradients.fill_(1.0)

    loader = LatentLoader(open_store(job["url"]), batch_size=job["batch"], ranks=ranks, prefetch=PREFETCH)
    alone: dict[str, list[float]] = {"load_s": [], "exchange_s": []}

    def time_alone() -> None:
        half = -(-job["batches"] // 2)
        alone["load_s"] += timed(lambda: next(loader), half, exchange, skip=PREFETCH + 2)
        alone["exchange_s"] += timed(exchange, job["steps"] // 2, exchange)

    time_alone()  # once before and once after the steps, as a machine that others use changes
    points = [{"straggler": (0.0, 1.0)}]
    if job["straggling"]:
        points.append({"straggler": STRAGGLER})
    random = np.random.default_rng(ranks.rank)
    for point in points:
        compute_s: list[float] = []
        probability, factor = point["straggler"]

        def step(probability: float = probability, factor: float = factor, compute_s: list = compute_s) -> None:
            next(loader)
            slow = random.random() < probability
            started_s = time.perf_counter()
            time.sleep(PAUSE_S * (factor if slow else 1.0))
            # Stragglers are drawn again in the simulation: what goes in is the ordinary step.
            compute_s.append((time.perf_counter() - started_s) / (factor if slow else 1.0))
            exchange()

        step_s = timed(step, job["steps"], exchange, skip=PREFETCH + 2)
        point |= {"compute_s": compute_s, "step_s": step_s}
    time_alone()
    loader.close()
    known = {"storage": job["storage"], "ranks": ranks.world, "batch": job["batch"]}
    return [known | point | alone for point in points]


def timed(run: Callable[[], object], times: int, together: Callable[[], None], skip: int = 1) -> list[float]:
    """Seconds of each run, after some that are not counted; all ranks begin together."""
    for _ in range(skip):
        run()
    together()
    seconds = []
    for _ in range(times):
        started_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_s)
    return seconds


# --- results --------------------------------------------------------------------------------------------------------


def merge(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of all rounds, one for each storage, number of ranks and kind of step; `reads` by round."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in points:
        key = (point["storage"], point["ranks"], tuple(point["straggler"]))
        known = merged.setdefault(
            key, {**point, "load_s": [], "exchange_s": [], "compute_s": [], "step_s": [], "reads": []}
        )
        for name in ("load_s", "exchange_s", "compute_s", "step_s"):
            known[name] = known[name] + point[name]
        known["reads"].append(statistics.mean(point["load_s"]))
    return list(merged.values())


def report(points: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The common form: samples/s of reading alone, milliseconds of steps, and all times for the simulation."""
    rows = []
    for point in points:
        name = f"{point['storage']}, {point['ranks']} ranks"
        if not point["straggler"][0]:
            rates = [point["ranks"] * point["batch"] / seconds for seconds in point["reads"]]
            rows.append(row(f"{name}, reading", rates, "samples/s"))
        label = "steps with stragglers" if point["straggler"][0] else "steps"
        rows.append(row(f"{name}, {label}", [1e3 * seconds for seconds in point["step_s"]], "ms"))
    kept = [{name: point[name] for name in point if name != "reads"} for point in points]
    for point in kept:
        for name in TIMES:
            point[name] = [float(f"{seconds:.5g}") for seconds in point[name]]
    question = "How many samples/s do ranks read together, and what is left of it in a step?"
    facts = {"batch": args.batch, "images": args.images, "prefetch": PREFETCH, "pause_ms": 1e3 * PAUSE_S}
    facts["cores"] = len(os.sched_getaffinity(0))
    return make_result("loader_scaling", question, rows[0]["name"], rows, "cpu", **facts, points=kept)


if __name__ == "__main__":
    exit_cleanly(main)
