"""Differentiable augmentation: what it may and may not change (its numbers are in tests/golden/test_disc.py)."""

from __future__ import annotations

import pytest
import torch

from rae_fast.autoencoder.augment import DiffAugment
from rae_fast.autoencoder.objective import augment_draws

EVERY, NONE = torch.zeros(3), torch.ones(3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def draws() -> torch.Tensor:
    return torch.rand(7, 4, generator=torch.Generator().manual_seed(1))


def test_probability_zero_changes_nothing(images: torch.Tensor, draws: torch.Tensor) -> None:
    assert DiffAugment(prob=0.0, cutout=0.5)(images, EVERY, draws) is images


def test_policies_that_do_not_act_change_nothing(images: torch.Tensor, draws: torch.Tensor) -> None:
    assert torch.equal(DiffAugment(prob=0.5, cutout=0.5)(images, NONE, draws), images)


def test_an_image_is_augmented_alike_whatever_shares_its_batch(images: torch.Tensor, draws: torch.Tensor) -> None:
    augment = DiffAugment(prob=1.0, cutout=0.3)
    whole = augment(images, EVERY, draws)
    alone = torch.cat([augment(images[i : i + 1], EVERY, draws[:, i : i + 1]) for i in range(4)])
    assert torch.allclose(whole, alone, atol=1e-6)


def test_translation_moves_by_whole_pixels_and_leaves_black(images: torch.Tensor) -> None:
    draws = torch.full((7, 4), 0.5)
    draws[0], draws[1] = 0.0, 0.999  # up by 2 of 16 rows, left by 3 of 24 columns: source row = row - 2
    colour_off = torch.tensor([0.0, 1.0, 1.0])
    moved = DiffAugment(prob=0.9)(images, colour_off, draws)
    assert torch.equal(moved[:, :, 2:, :-3], images[:, :, :-2, 3:])
    assert moved[:, :, :2].abs().max() == 0 and moved[:, :, :, -3:].abs().max() == 0


def test_cutout_blanks_a_rectangle_of_the_asked_size(images: torch.Tensor) -> None:
    draws = torch.full((7, 4), 0.5)
    holes = DiffAugment(prob=0.9, cutout=0.5)(images, torch.tensor([1.0, 1.0, 0.0]), draws) == 0
    assert holes.all(1).flatten(1).sum(1).tolist() == [8 * 12] * 4


def test_gradients_reach_the_images(images: torch.Tensor, draws: torch.Tensor) -> None:
    images = images.requires_grad_()
    (grad,) = torch.autograd.grad(DiffAugment(prob=1.0)(images, EVERY, draws).square().sum(), images)
    assert grad.abs().sum() > 0 and bool(grad.isfinite().all())


def test_draws_depend_on_sample_and_step_but_not_on_the_batch() -> None:
    index = torch.arange(8)
    whole = augment_draws(3, 1, 5, index)
    halves = [augment_draws(3, 1, 5, part) for part in index.split(4)]
    assert torch.equal(whole.u_3UB, torch.cat([half.u_3UB for half in halves], dim=2))
    assert torch.equal(whole.policy_3P, halves[1].policy_3P)
    assert not torch.equal(whole.policy_3P, augment_draws(3, 1, 6, index).policy_3P)
    assert not torch.equal(whole.u_3UB[0], whole.u_3UB[1])
