"""The simulation against cases worked out by hand, and against what was measured on 1, 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

MEASURED = Path(__file__).parents[2] / "benchmarks/results/loader_scaling.json"


@pytest.fixture
def simulation(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("simulate")


def test_fast_loaders_hide_behind_computing(simulation: ModuleType) -> None:
    cluster = simulation.Cluster(2, [0.05], [0.01], 0.002)
    times, waits = simulation.simulate(cluster, 50)
    assert times[0] == pytest.approx(0.01 + 0.05 + 0.002)
    assert times[1:] == pytest.approx(np.full(49, 0.052))
    assert waits[1:] == pytest.approx(np.zeros(49))


def test_slow_loaders_set_the_pace_once_their_stock_is_gone(simulation: ModuleType) -> None:
    times, waits = simulation.simulate(simulation.Cluster(1, [0.05], [0.2], 0.0), 50)
    assert times[1:] == pytest.approx(np.full(49, 0.2))
    assert waits[1:] == pytest.approx(np.full(49, 0.15))


def test_prefetched_batches_bridge_one_slow_read(simulation: ModuleType) -> None:
    """A read of 4 steps' length is hidden by a stock of 4, and not by a stock of 1."""
    base = simulation.Cluster(1, [0.05], [0.01], 0.0, slow_read=(0.02, 0.19))
    bridged = simulation.simulate(replace(base, prefetch=4), 4000)[1][10:].sum()
    exposed = simulation.simulate(replace(base, prefetch=1), 4000)[1][10:].sum()
    assert bridged < 0.25 * exposed


def test_one_straggler_holds_all_ranks(simulation: ModuleType) -> None:
    base = simulation.Cluster(1, [0.05], [0.001], 0.0, straggler=(0.1, 3.0))
    means = [simulation.simulate(replace(base, ranks=ranks), 20_000)[0].mean() for ranks in (1, 8)]
    expected = [0.05 * (1 + 2 * (1 - 0.9**ranks)) for ranks in (1, 8)]
    assert means == pytest.approx(expected, rel=0.02)


def test_exchange_shows_where_the_backward_pass_is_shorter(simulation: ModuleType) -> None:
    cluster = simulation.Cluster(4, [0.09], [0.001], 0.01, hidden_s=0.08)
    assert simulation.simulate(cluster, 20)[0][5:] == pytest.approx(np.full(15, 0.09 + 0.01 + 0.08 - 0.06))


def test_equal_seeds_give_equal_runs(simulation: ModuleType) -> None:
    cluster = simulation.Cluster(4, [0.05, 0.06], [0.01, 0.03], 0.0, straggler=(0.1, 2.0))
    runs = [simulation.simulate(cluster, 100, seed)[0] for seed in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.skipif(not MEASURED.exists(), reason="loader_scaling.py has not been run")
def test_simulation_agrees_with_measured_ranks_within_15_percent(simulation: ModuleType) -> None:
    result = simulation.check(MEASURED)
    ratios = {entry["name"]: entry["of_measured"] for entry in result["rows"] if "of_measured" in entry}
    assert {name.split(", ")[1].split()[0] for name in ratios} >= {"1", "2", "4"}
    assert ratios == {name: pytest.approx(1, abs=0.15) for name in ratios}
