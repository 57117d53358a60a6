"""Class sweeps and interpolations: their corners are ordinary samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rae_fast.autoencoder.rae import RAE, build_rae
from rae_fast.config import Config
from rae_fast.config_file import load_config
from rae_fast.errors import UserError
from rae_fast.geometry import resolve_geometry
from rae_fast.sampling import LatentSampler, draw_images, load_sampler
from rae_fast.sampling.grids import class_sweep, great_circle, interpolation, label_line

SEED = 4


@pytest.fixture(scope="module", params=["ODE", "SDE"])
def drawing(request: pytest.FixtureRequest, settings: list[str]) -> tuple[LatentSampler, RAE]:
    config: Config = load_config(None, [*settings, f"sampler.mode={request.param}"])
    sampler = load_sampler(config, resolve_geometry(config), torch.device("cpu"))
    return sampler, build_rae(config.stage_1, need_encoder=False).eval()


def samples(drawing: tuple[LatentSampler, RAE], labels: list[int], index: list[int]) -> np.ndarray:
    return draw_images(*drawing, np.array(labels), np.array(index), SEED)


def test_a_sweep_has_classes_as_rows_and_noises_as_columns(drawing: tuple[LatentSampler, RAE]) -> None:
    swept = class_sweep(*drawing, classes=[2, 0], columns=3, seed=SEED)
    assert np.array_equal(swept, samples(drawing, [2, 2, 2, 0, 0, 0], [0, 1, 2, 0, 1, 2]))


def test_the_ends_of_an_interpolation_are_ordinary_samples(drawing: tuple[LatentSampler, RAE]) -> None:
    rows = interpolation(*drawing, ends=(0, 2), columns=5, rows=2, seed=SEED).reshape(2, 5, 16, 16, 3)
    ends = samples(drawing, [0, 2, 0, 2], [0, 1, 2, 3]).astype(int)
    for row, start, end in ((0, 0, 1), (1, 2, 3)):
        assert np.abs(rows[row, 0] - ends[start]).max() <= 1
        assert np.abs(rows[row, -1] - ends[end]).max() <= 1
        assert len({image.tobytes() for image in rows[row]}) == 5


def test_with_fixed_noise_only_the_class_changes(drawing: tuple[LatentSampler, RAE]) -> None:
    row = interpolation(*drawing, ends=(0, 1), columns=3, rows=1, seed=SEED, fixed_noise=True)
    assert np.abs(row[[0, 2]] - samples(drawing, [0, 1], [0, 0]).astype(int)).max() <= 1
    same = interpolation(*drawing, ends=(1, 1), columns=3, rows=1, seed=SEED, fixed_noise=True)
    assert np.abs(same[0].astype(int) - same[1]).max() <= 1


def test_points_on_the_great_circle_keep_the_norm() -> None:
    z0, z1 = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    z1 = z1 / z1.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) * z0.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    middle = great_circle(z0, z1, 0.3)
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), z0.flatten(1).norm(dim=1))
    assert torch.equal(great_circle(z0, z0, 0.3), z0)


def test_labels_between_classes_leave_the_model_as_it_was(drawing: tuple[LatentSampler, RAE]) -> None:
    sampler = drawing[0]
    table = sampler.model.y_embedder.embedding_table.weight
    with label_line(sampler, (0, 2), torch.tensor([0.0, 0.5])) as labels:
        assert labels.tolist() == [4, 5]
        grown = sampler.model.y_embedder.embedding_table.weight
        torch.testing.assert_close(grown[5], (table[0] + table[2]) / 2)
        assert torch.equal(grown[:4], table)
    assert sampler.model.y_embedder.embedding_table.weight is table


def test_grids_without_room_are_refused(drawing: tuple[LatentSampler, RAE]) -> None:
    with pytest.raises(UserError, match="1 columns in 1 rows"):
        interpolation(*drawing, ends=(0, 1), columns=1, rows=1, seed=SEED)
