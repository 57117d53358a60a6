"""How do loader and ZeRO's exchange scale, with stragglers and slow storage, to more ranks than this machine has?

    python benchmarks/simulate.py                                   # against the ranks that loader_scaling.py measured
    python benchmarks/simulate.py --gpus 8 64 512 --global-batch 1024 --batch-grows

A discrete simulation: each rank's loader prepares batches one after the other and stops `prefetch` ahead of the step;
a step begins when the one before has ended and its batch is there; it computes, waits for the slowest rank, and
exchanges gradients and weights. Times of single parts go in (measured by benchmarks/loader_scaling.py, or computed
from data sheets); the time of a step comes out. Where loader_scaling.py has measured whole steps too, both stand side
by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from results_file import RESULTS, make_result, print_table, row, write_result

from rae_fast.errors import UserError, exit_cleanly
from rae_fast.planner.devices import LINK_SHARE, find_gpu
from rae_fast.planner.host import EXPECTED_SHARE, NODE
from rae_fast.planner.roofline import floor_s, from_preset, parameters
from rae_fast.provenance import read_json

NETWORK_GBS = 50  # of a GPU to other nodes: 400 Gbit/s, one adapter for each GPU
READ_SAMPLES_S = 12_000  # of one rank, cold, verified, by 16 threads (research/store.md)
BACKWARD_SHARE = 2 / 3  # of computing, behind which gradients are reduced


@dataclass(frozen=True)
class Cluster:
    """What a simulated run is made of; times in seconds.

    Attributes:
        ranks: processes that step together.
        compute_s: measured or assumed durations of computing; drawn at random.
        load_s: durations of preparing one batch on a rank.
        exchange_s: of the exchange after computing that nothing hides.
        hidden_s: of the exchange that runs behind the backward pass; what is longer than that shows.
        prefetch: batches a loader keeps ready.
        straggler: probability that a rank's step takes longer, and how many times as long.
        slow_read: probability that a batch comes late, and by how many seconds.
    """

    ranks: int
    compute_s: Sequence[float]
    load_s: Sequence[float]
    exchange_s: float
    hidden_s: float = 0.0
    prefetch: int = 4
    straggler: tuple[float, float] = (0.0, 1.0)
    slow_read: tuple[float, float] = (0.0, 0.0)


def simulate(cluster: Cluster, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each step, and seconds that each step's slowest rank waited for data, both [steps].

    With r a rank and j a step: ready[r, j] = max(ready[r, j - 1], taken[r, j - prefetch - 1]) + load[r, j];
    begin[r, j] = max(end[j - 1], ready[r, j]); end[j] = max over r of (begin + compute) + exchange.
    """
    random = np.random.default_rng(seed)
    shape = (steps, cluster.ranks)
    compute, load = (random.choice(np.asarray(s, float), shape) for s in (cluster.compute_s, cluster.load_s))
    compute = np.where(random.random(shape) < cluster.straggler[0], compute * cluster.straggler[1], compute)
    load = load + cluster.slow_read[1] * (random.random(shape) < cluster.slow_read[0])
    taken = np.zeros((steps, cluster.ranks))
    ready, end = np.zeros(cluster.ranks), 0.0
    times, waits = np.empty(steps), np.empty(steps)
    for j in range(steps):
        # A queue of `prefetch`, and one batch in the producer's hands.
        free = taken[j - cluster.prefetch - 1] if j > cluster.prefetch else np.zeros(cluster.ranks)
        ready = np.maximum(ready, free) + load[j]
        begin = np.maximum(end, ready)
        taken[j] = begin
        shown = max(0.0, cluster.hidden_s - BACKWARD_SHARE * float(compute[j].min()))
        finish = float((begin + compute[j]).max()) + shown + cluster.exchange_s
        times[j], waits[j] = finish - end, float((begin - end).max())
        end = finish
    return times, waits


def steady(values: np.ndarray, prefetch: int) -> np.ndarray:
    """Without the first steps, whose batches are not ready yet or were ready long before."""
    return values[min(2 * prefetch + 2, len(values) // 2) :]


# --- against measurements -------------------------------------------------------------------------------------------


def check(path: Path) -> dict[str, Any]:
    """Simulated beside measured steps of `loader_scaling.py`.

    Raises:
        UserError: there is no such result.
    """
    measured = read_json(path)
    rows = []
    for point in measured["points"]:
        cluster = Cluster(
            point["ranks"],
            point["compute_s"],
            point["load_s"],
            float(np.mean(point["exchange_s"])),
            prefetch=measured["prefetch"],
            straggler=tuple(point["straggler"]),
        )
        times, _ = simulate(cluster, steps=len(point["step_s"]) * 20)
        simulated, found = steady(times, cluster.prefetch), np.asarray(point["step_s"])
        ratio = float(simulated.mean() / found.mean())
        name = f"{point['storage']}, {point['ranks']} ranks" + (", stragglers" if point["straggler"][0] else "")
        rows.append(row(f"{name}, measured", 1e3 * found, "ms"))
        # Server, clients and ranks then fight for cores in a step as they do not in reading alone.
        crowded = point["storage"] == "s3" and point["ranks"] > measured["cores"]
        facts = {"of_measured_crowded" if crowded else "of_measured": round(ratio, 3)}
        rows.append(row(f"{name}, simulated", 1e3 * simulated, "ms", **facts))
    question = "Does the simulation agree with measured steps on 1, 2 and 4 ranks?"
    return make_result("simulate", question, rows[0]["name"], rows, "cpu", measured_at=measured["date"])


# --- beyond them ----------------------------------------------------------------------------------------------------


def gpu_cluster(model: str, gpus: int, global_batch: int, gpu: str, jitter: float = 0.02) -> Cluster:
    """A cluster of GPUs in nodes of eight, every figure computed: step from the floor, exchange from the links.

    ZeRO stage 1 in float32: gradients are reduced to their owners behind the backward pass, weights are gathered after
    the step; each moves 4 P (n - 1) / n bytes over the slowest link on the way.
    """
    device, network = find_gpu(gpu), from_preset(model, 256, 768)
    share = max(1, global_batch // gpus)
    compute_s = share * sum(floor_s(network, share, device.tflops, device.tbs).values()) / EXPECTED_SHARE
    link = (device.link_gbs if gpus <= NODE else min(device.link_gbs, NETWORK_GBS)) * 1e9 * LINK_SHARE
    moved_s = 4 * parameters(network) * (gpus - 1) / gpus / link
    spread = compute_s * (1 + jitter * np.abs(np.random.default_rng(0).standard_normal(256)))
    return Cluster(gpus, spread, [share / READ_SAMPLES_S], moved_s, moved_s)


def scaling_table(args: argparse.Namespace) -> list[str]:
    """One line for each number of GPUs: ideal, and with stragglers and slow storage."""
    head = "| GPUs | batch of one | images/s | of ideal | with stragglers | with slow storage | data wait then |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    alone = None
    for gpus in args.gpus:
        batch = args.global_batch * (max(1, gpus // NODE) if args.batch_grows else 1)
        cluster = gpu_cluster(args.model, gpus, batch, args.gpu)
        rates, waits = [], 0.0
        for changed in (
            cluster,
            replace(cluster, straggler=(args.straggler, 1.5)),
            replace(cluster, slow_read=(args.slow_read, 5.0)),
        ):
            times, wait = simulate(changed, args.steps)
            rates.append(batch / steady(times, 4).mean())
            waits = float(steady(wait, 4).mean() / steady(times, 4).mean())
        alone = alone or rates[0] / gpus
        shares = " | ".join(f"{rate / rates[0]:.0%}" for rate in rates[1:])
        lines.append(
            f"| {gpus} | {batch // gpus} | {rates[0]:,.0f} | {rates[0] / gpus / alone:.0%} | {shares} | {waits:.1%} |"
        )
    return lines


def main() -> None:
    """Compare with measurements, or tabulate clusters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "loader_scaling.json")
    parser.add_argument("--gpus", type=int, nargs="+", help="simulate so many GPUs instead; all figures computed")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--model", default="DiTDH-XL")
    parser.add_argument("--global-batch", type=int, default=1024)
    parser.add_argument("--batch-grows", action="store_true", help="with the number of nodes")
    parser.add_argument("--straggler", type=float, default=0.001, help="probability of a step 1.5 times as long")
    parser.add_argument("--slow-read", type=float, default=1e-4, help="probability of a batch 5 s late")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write the comparison here as JSON")
    args = parser.parse_args()
    if args.gpus:
        if min(args.gpus) < 1:
            raise UserError(f"--gpus {args.gpus}", "at least 1")
        print("\n".join(scaling_table(args)))
        return
    result = check(args.measured)
    print_table(result)
    for entry in result["rows"]:
        for key, remark in (("of_measured", ""), ("of_measured_crowded", ", not judged: ranks and server share cores")):
            if key in entry:
                print(f"{entry['name']}: {entry[key]:.3f} of the measured mean{remark}")
    if args.out:
        write_result(args.out, result)


if __name__ == "__main__":
    exit_cleanly(main)
