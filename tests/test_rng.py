import numpy as np
import pytest
import torch

from rae_fast import rng
from rae_fast.rng import Stream


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_known_answers(word: int, expected: tuple[int, ...]) -> None:
    counter = torch.full((1, 1), word, dtype=torch.int64)
    assert tuple(int(w) for w in rng._philox((counter,) * 4, word, word)) == expected


def test_a_sample_draws_the_same_whatever_batch_it_is_in() -> None:
    index = torch.tensor([5, 17, 2**40 + 3])
    together = rng.normal(1, 2, index, Stream.NOISE, (3, 5, 7))
    alone = torch.cat([rng.normal(1, 2, index[i : i + 1], Stream.NOISE, (3, 5, 7)) for i in range(3)])
    assert torch.equal(together, alone)


def test_seed_epoch_index_and_stream_each_change_the_draw() -> None:
    index = torch.tensor([3])
    base = rng.uniform(0, 0, index, Stream.NOISE, (8,))
    others = [
        rng.uniform(1, 0, index, Stream.NOISE, (8,)),
        rng.uniform(0, 1, index, Stream.NOISE, (8,)),
        rng.uniform(0, 0, index + 1, Stream.NOISE, (8,)),
        rng.uniform(0, 0, index + 2**32, Stream.NOISE, (8,)),
        rng.uniform(0, 0, index, Stream.TIME, (8,)),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_uniform_and_normal_have_their_moments() -> None:
    index = torch.arange(512)
    u = rng.uniform(7, 0, index, Stream.TIME, (400,)).double()
    assert u.min() >= 0
    assert u.max() < 1
    # Five standard errors of the mean of 204,800 draws.
    assert abs(u.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / u.numel() ** 0.5
    n = rng.normal(7, 0, index, Stream.NOISE, (400,)).double()
    assert abs(n.mean()) < 5 / n.numel() ** 0.5
    assert abs(n.var() - 1) < 5 * (2 / n.numel()) ** 0.5
    assert abs((n**4).mean() - 3) < 0.2


def test_scalar_draw_has_one_number_a_sample() -> None:
    assert rng.uniform(0, 0, torch.arange(4), Stream.TIME).shape == (4,)


def test_permutation_is_one_and_differs_between_epochs() -> None:
    first = rng.permutation(3, 0, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, rng.permutation(3, 0, 1000))
    assert not np.array_equal(first, rng.permutation(3, 1, 1000))
