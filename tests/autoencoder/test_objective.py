"""The decoder's objective: gradients taken once are the gradients that autograd takes the long way."""

from __future__ import annotations

import pytest
import torch

from rae_fast.autoencoder.augment import DiffAugment
from rae_fast.autoencoder.decoder import DecoderConfig, ViTDecoder
from rae_fast.autoencoder.discriminator import DiscriminatorHeads, build_backbone, build_heads
from rae_fast.autoencoder.objective import DecoderObjective, Phase, Starts, augment_draws, discretized
from rae_fast.autoencoder.step import last_layer_input
from rae_fast.config import DiscriminatorArch, GanLoss

SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "image_size": 32}
LOSS = GanLoss(disc_weight=0.7, perceptual_weight=0.3)


class Blur(torch.nn.Module):
    """Stands in for a perceptual network: the distance of averages."""

    def forward(self, recon: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(recon - target, 4).square().mean()


@pytest.fixture
def decoder() -> ViTDecoder:
    torch.manual_seed(0)
    sizes = DecoderConfig(
        hidden_size=16,
        grid=4,
        patch_size=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )
    return ViTDecoder(sizes).requires_grad_(True)


@pytest.fixture
def heads() -> DiscriminatorHeads:
    arch = DiscriminatorArch(recipe=SIZES, key_depths=[0], ks=3)
    return build_heads(arch, build_backbone(arch)).train()


def objective(decoder: ViTDecoder) -> DecoderObjective:
    backbone = build_backbone(DiscriminatorArch(recipe=SIZES, key_depths=[0]))
    return DecoderObjective(LOSS, decoder.unpatchify, Blur(), backbone, DiffAugment(1.0, 0.2))


def test_surrogate_has_the_gradients_of_the_whole_loss(decoder: ViTDecoder, heads: DiscriminatorHeads) -> None:
    torch.manual_seed(1)
    tokens, target = torch.randn(3, 16, 16), torch.rand(3, 3, 32, 32)
    ours, draws = objective(decoder), augment_draws(0, 0, 0, torch.arange(3))
    last_input = last_layer_input(decoder)
    patches = decoder(tokens)
    parts = ours.generator(patches, last_input()[:, 1:], target, heads, draws, Phase(True, True, True))
    (terms,) = ours.balanced([parts])
    once = torch.autograd.grad(terms.surrogate(patches), list(decoder.parameters()))

    image = decoder.unpatchify(decoder(tokens))
    heads.eval()
    reconstruction = (image - target).abs().mean() + LOSS.perceptual_weight * Blur()(image, target)
    seen = ours.augment(image * 2 - 1, draws.policy_3P[0], draws.u_3UB[0])
    adversarial = -heads(ours.backbone(seen)).mean()
    norms = [
        torch.autograd.grad(part, decoder.last_layer, retain_graph=True)[0].norm()
        for part in (reconstruction, adversarial)
    ]
    weight = norms[0] / (norms[1] + 1e-6)
    total = reconstruction + LOSS.disc_weight * weight.detach() * adversarial
    twice = torch.autograd.grad(total, list(decoder.parameters()))

    assert terms.adaptive_weight.item() == pytest.approx(weight.item(), rel=1e-4)
    assert terms.surrogate(patches).item() == pytest.approx(total.item(), rel=1e-5)
    for a, b in zip(once, twice, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(b.norm()) + 1e-9)


def test_decoder_s_update_leaves_the_heads_as_they_were(decoder: ViTDecoder, heads: DiscriminatorHeads) -> None:
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    last_input = last_layer_input(decoder)
    patches = decoder(torch.randn(2, 16, 16))
    draws = augment_draws(0, 0, 0, torch.arange(2))
    ours = objective(decoder)
    parts = ours.generator(patches, last_input()[:, 1:], torch.rand(2, 3, 32, 32), heads, draws, Phase(1, 1, 1))
    (terms,) = ours.balanced([parts])
    terms.surrogate(patches).backward()
    assert heads.training
    assert all(parameter.grad is None for parameter in heads.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in heads.state_dict().items())


def test_parts_that_are_off_cost_nothing_and_count_nothing(decoder: ViTDecoder) -> None:
    last_input = last_layer_input(decoder)
    patches = decoder(torch.randn(2, 16, 16))
    target = torch.rand(2, 3, 32, 32)
    ours = objective(decoder)
    off = Phase(False, False, False)
    (terms,) = ours.balanced([ours.generator(patches, last_input()[:, 1:], target, None, None, off)])
    expected = (decoder.unpatchify(patches) - target).abs().mean().item()
    assert float(terms.total) == float(terms.l1) == pytest.approx(expected)
    assert float(terms.perceptual) == float(terms.adversarial) == 0


def test_discriminator_rates_real_images_it_has_learned_higher(decoder: ViTDecoder, heads: DiscriminatorHeads) -> None:
    ours = objective(decoder)
    torch.manual_seed(2)
    fake, real = torch.full((4, 3, 32, 32), 0.5), torch.rand(4, 3, 32, 32)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    first = None
    for step in range(12):
        terms = ours.discriminator(heads, fake, real, augment_draws(0, 0, step, torch.arange(4)))
        first = first or terms
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    assert terms.loss.item() < 0.7 * first.loss.item() and float(terms.accuracy) > 0.9


def test_fakes_lie_on_the_eight_bit_grid() -> None:
    values = discretized(torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 0.7, 1.0, 3.0]))
    levels = (values + 1) * 127.5
    assert levels.tolist() == pytest.approx([0, 0, 0, 1, round(0.7 * 255), 255, 255], abs=1e-4)


def test_phases_begin_at_their_epochs_and_never_without_weight() -> None:
    loss = GanLoss(perceptual_weight=1.0, lpips_start=1, disc_weight=0.5, disc_upd_start=2, disc_start=3)
    starts = Starts.of(loss, steps_per_epoch=10, images_per_step=32)
    at = [starts.phase(step) for step in (0, 9, 10, 19, 20, 29, 30)]
    assert [phase.perceptual for phase in at] == [False, False, True, True, True, True, True]
    assert [phase.discriminator for phase in at] == [False] * 4 + [True] * 3
    assert [phase.adversarial for phase in at] == [False] * 6 + [True]
    never = Starts.of(GanLoss(), steps_per_epoch=10, images_per_step=32)
    assert never.phase(100) == Phase(False, False, False)
    shared = Starts.of(GanLoss(disc_weight=1.0, disc_start=3), steps_per_epoch=10, images_per_step=32).phase(30)
    assert shared.discriminator and shared.adversarial  # disc_upd_start follows disc_start


def test_starts_may_be_counted_in_images() -> None:
    loss = GanLoss(perceptual_weight=1.0, lpips_start=64, disc_weight=1.0, disc_start=65, starts_in="images")
    starts = Starts.of(loss, steps_per_epoch=10, images_per_step=32)
    assert starts == Starts(perceptual=2, adversarial=3, discriminator=3)
    whole = GanLoss(disc_weight=1.0, disc_start=1.1)  # 1.1 * 10 is a bit more than 11
    assert Starts.of(whole, steps_per_epoch=10, images_per_step=32).adversarial == 11
