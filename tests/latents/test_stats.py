"""Latent statistics: exact, the same however the samples arrive, and refusing nonsense."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.latents.stats import LatentStatistics, save_statistics

SHAPE = (3, 2, 4)


def latents(n: int, offset: float = 0.0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n)) + offset


def gathered(z: Tensor, batch: int) -> LatentStatistics:
    statistics = LatentStatistics(SHAPE)
    for part in z.split(batch):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_mean_and_variance_are_those_of_numpy_in_float64(n: int, offset: float) -> None:
    z = latents(n, offset)
    statistics = gathered(z, 7)
    mean, var = statistics.finish()
    assert statistics.count == n
    assert mean.dtype == var.dtype == torch.float32
    np.testing.assert_array_equal(mean, z.double().numpy().mean(0).astype(np.float32))
    np.testing.assert_allclose(var, z.double().numpy().var(0), rtol=1e-6, atol=1e-12)


def test_result_does_not_depend_on_batch_size_to_the_last_bit() -> None:
    z = latents(101)
    expected = gathered(z, 101).state()
    for batch in (1, 2, 7, 16, 33):
        found = gathered(z, batch).state()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_units_merged_in_order_give_the_same_bits_whoever_gathered_them() -> None:
    units = latents(100).split(23)

    def run(batch: int) -> dict[str, np.ndarray]:
        total = LatentStatistics(SHAPE)
        for unit in units:
            total.merge(LatentStatistics.from_state(gathered(unit, batch).state()))
        return total.state()

    first, second = run(5), run(64)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    whole = latents(100).double().numpy()
    np.testing.assert_allclose(first["mean"], whole.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(first["m2"] / 100, whole.var(0), rtol=1e-12)


def test_state_can_be_read_in_mid_block_and_gathering_goes_on_unchanged() -> None:
    z = latents(40)
    interrupted = LatentStatistics(SHAPE)
    for part in z.split(9):
        interrupted.update(part)
        interrupted.state()
    expected = gathered(z, 40).state()
    assert all(np.array_equal(interrupted.state()[key], expected[key]) for key in expected)


def test_merging_leaves_the_other_as_it_was_and_nothing_changes_nothing() -> None:
    one, other = gathered(latents(5), 5), gathered(latents(7), 7)
    before = other.state()
    one.merge(other)
    one.merge(LatentStatistics(SHAPE))
    assert one.count == 12
    assert all(np.array_equal(other.state()[key], before[key]) for key in before)


def test_state_survives_an_npz_file() -> None:
    statistics, buffer = gathered(latents(20), 20), io.BytesIO()
    np.savez(buffer, **statistics.state())
    buffer.seek(0)
    again = LatentStatistics.from_state(np.load(buffer))
    assert again.count == 20
    for ours, theirs in zip(again.finish(), statistics.finish(), strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_samples_are_gathered_in_float64() -> None:
    z = latents(32, 10.0).bfloat16()
    mean, _ = gathered(z, 8).finish()
    np.testing.assert_array_equal(mean, z.double().numpy().mean(0).astype(np.float32))


def test_the_caller_may_overwrite_its_batch() -> None:
    z = latents(3).double()
    statistics, buffer = LatentStatistics(SHAPE), z.clone()
    statistics.update(buffer)
    buffer.zero_()
    torch.testing.assert_close(statistics.finish()[0], z.mean(0).float())


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="no latents"):
        LatentStatistics(SHAPE).finish()
    with pytest.raises(UserError, match="shape"):
        LatentStatistics(SHAPE).update(torch.zeros(1, 3, 4, 4))
    poisoned = latents(4)
    poisoned[2, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        gathered(poisoned, 4).finish()


@pytest.mark.gpu
def test_device_does_not_change_a_bit() -> None:
    z = latents(50)
    ours, theirs = gathered(z.cuda(), 11).state(), gathered(z, 50).state()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("missing", [None, "mean", "var"])
def test_saved_statistics_have_the_reference_s_form(tmp_path: Path, missing: str | None) -> None:
    content = {"mean": torch.randn(SHAPE), "var": torch.rand(SHAPE, dtype=torch.float64)}
    if missing:
        content[missing] = None
    save_statistics(tmp_path / "stat.pt", **content)
    loaded = torch.load(tmp_path / "stat.pt", weights_only=True)
    assert set(loaded) == {"mean", "var"}
    for key, value in content.items():
        assert loaded[key] is None if value is None else torch.equal(loaded[key], value.float())
