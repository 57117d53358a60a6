"""What the decoder and the discriminator minimize, step by step as in the reference, without its double work.

Every loss is differentiated once, with respect to the decoder's output; the last layer's gradients, which the adaptive
weight needs, follow from that and the last layer's input by one matrix product. The reference runs LPIPS and the
discriminator backward a second time for them. The numbers are the same.

Shapes: B images, 3 x H x W pixels; N patches of E values, D decoder width; U = 7 augmentation draws, P = 3 policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rae_fast.autoencoder.augment import DRAWS, DiffAugment
from rae_fast.autoencoder.discriminator import DinoBackbone
from rae_fast.autoencoder.losses import DISCRIMINATOR_LOSSES, adaptive_weight, at_least_float32, generator_loss
from rae_fast.config import GanLoss
from rae_fast.rng import Stream, uniform

# Where in AUGMENT's stream the draws of a whole step live: no sample index is that large.
STEP_INDEX = 1 << 40
ROUNDING = 1e-6  # of a start in steps


@dataclass(frozen=True)
class AugmentDraws:
    """Uniforms of one batch for the three augmentations of a step.

    Attributes:
        policy_3P: [3, 3] on the CPU; rows are generator, fake, real.
        u_3UB: [3, 7, B] on the device.
    """

    policy_3P: Tensor
    u_3UB: Tensor


def augment_draws(seed: int, epoch: int, step: int, index_B: Tensor) -> AugmentDraws:
    """Draws that depend on the sample and the step alone, so not on batch size or number of ranks."""
    u_B3U = uniform(seed, epoch, index_B, Stream.AUGMENT, (3, DRAWS))
    policy = uniform(seed, epoch, torch.tensor([STEP_INDEX + step]), Stream.AUGMENT, (3, 3))
    return AugmentDraws(policy[0], u_B3U.permute(1, 2, 0).contiguous())


@dataclass(frozen=True)
class Phase:
    """Which parts of the game are on at a step."""

    perceptual: bool
    adversarial: bool
    discriminator: bool


@dataclass(frozen=True)
class Starts:
    """The first optimizer step, counted from 0, in which each part is on; None: never."""

    perceptual: int | None
    adversarial: int | None
    discriminator: int | None

    @classmethod
    def of(cls, loss: GanLoss, *, steps_per_epoch: int, images_per_step: int) -> Starts:
        """The config's starts, which are in epochs or images; a part whose weight is zero never starts."""
        steps = float(steps_per_epoch) if loss.starts_in == "epochs" else 1 / images_per_step

        def first(start: float, weight: float) -> int | None:
            return ceil(start * steps - ROUNDING) if weight > 0 else None

        update_start = loss.disc_start if loss.disc_upd_start is None else loss.disc_upd_start
        return cls(
            perceptual=first(loss.lpips_start, loss.perceptual_weight),
            adversarial=first(loss.disc_start, loss.disc_weight),
            discriminator=first(update_start, loss.disc_weight),
        )

    def phase(self, step: int) -> Phase:
        """What is on at a step."""
        return Phase(
            *(first is not None and step >= first for first in (self.perceptual, self.adversarial, self.discriminator))
        )


@dataclass(frozen=True)
class GeneratorParts:
    """Losses of the decoder on one micro-batch before they are balanced, and their gradients at its output.

    Attributes:
        reconstruction: l1 + perceptual_weight * perceptual.
        grad_BNE: of `reconstruction`.
        adversarial_grad_BNE: of `adversarial`; None while that is off.
        last_layer_grads_2ED: of both with respect to the last layer's weight; None while `adversarial` is off.
    """

    l1: Tensor
    perceptual: Tensor
    adversarial: Tensor
    reconstruction: Tensor
    grad_BNE: Tensor
    adversarial_grad_BNE: Tensor | None = None
    last_layer_grads_2ED: Tensor | None = None


@dataclass(frozen=True)
class GeneratorTerms:
    """Losses of the decoder, scalars on the device, and the gradient of their total at the decoder's output.

    `total` = l1 + perceptual_weight * perceptual + disc_weight * adaptive_weight * adversarial.
    """

    patch_grad_BNE: Tensor
    l1: Tensor
    perceptual: Tensor
    adversarial: Tensor
    adaptive_weight: Tensor
    total: Tensor

    def surrogate(self, patches_BNE: Tensor) -> Tensor:
        """A scalar on the decoder's graph with the value and the gradient of `total`."""
        product = (patches_BNE * self.patch_grad_BNE.to(patches_BNE.dtype)).sum()
        return product - product.detach() + self.total


@dataclass(frozen=True)
class DiscriminatorTerms:
    """Loss of the discriminator, and the share of logits that rate the real image higher; scalars on the device."""

    loss: Tensor
    accuracy: Tensor
    real_logits: Tensor
    fake_logits: Tensor


class DecoderObjective:
    """Both players' losses.

    Args:
        loss: weights and kinds.
        to_pixels: decoder output [B, N, E] -> images [B, 3, H, W] in about [0, 1].
        perceptual: (reconstruction, target) in [0, 1] -> scalar, or None.
        backbone: the frozen ViT of the discriminator, or None without a discriminator.
        augment: what the discriminator's images go through.
        autocast: a context for the loss networks, made anew for each use.
        mean_over_ranks: averages a tensor over all ranks.
    """

    def __init__(
        self,
        loss: GanLoss,
        to_pixels: Callable[[Tensor], Tensor],
        perceptual: nn.Module | None,
        backbone: DinoBackbone | None,
        augment: DiffAugment,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.loss, self.to_pixels = loss, to_pixels
        self.perceptual, self.backbone, self.augment = perceptual, backbone, augment
        self.autocast, self.mean_over_ranks = autocast, mean_over_ranks
        self.discriminator_loss = DISCRIMINATOR_LOSSES[loss.disc_loss]

    def generator(
        self,
        patches_BNE: Tensor,
        last_input_BND: Tensor,
        target_B3HW: Tensor,
        heads: nn.Module | None,
        draws: AugmentDraws | None,
        phase: Phase,
    ) -> GeneratorParts:
        """The decoder's losses on what it made of noised latents; `balanced` makes the whole of them.

        Args:
            patches_BNE: the decoder's output.
            last_input_BND: what its last layer made the patches from, class token left out.
            target_B3HW: the original images in [0, 1].
            heads: the discriminator's heads; used in eval mode, without gradients for them.
            draws: augmentation draws; None only where `phase` has no adversarial part.
            phase: which parts are on.
        """
        patches = at_least_float32(patches_BNE.detach()).requires_grad_()
        with torch.enable_grad():
            image = self.to_pixels(patches)
            l1 = (image - target_B3HW).abs().mean()
            adversarial = perceptual = torch.zeros_like(l1)
            if phase.perceptual:
                assert self.perceptual is not None
                with self.autocast():
                    perceptual = at_least_float32(self.perceptual(image, target_B3HW))
            reconstruction = l1 + self.loss.perceptual_weight * perceptual
            (grad,) = torch.autograd.grad(reconstruction, patches, retain_graph=phase.adversarial)
            if not phase.adversarial:
                return GeneratorParts(l1.detach(), perceptual.detach(), adversarial, reconstruction.detach(), grad)
            assert heads is not None and draws is not None
            adversarial = self._adversarial(image, heads, draws)
            (adversarial_grad,) = torch.autograd.grad(adversarial, patches)
        inputs = at_least_float32(last_input_BND.detach()).flatten(0, 1)
        last_layer = torch.stack([part.flatten(0, 1).T @ inputs for part in (grad, adversarial_grad)])
        losses = (part.detach() for part in (l1, perceptual, adversarial, reconstruction))
        return GeneratorParts(*losses, grad, adversarial_grad, last_layer)

    def balanced(self, group: Sequence[GeneratorParts]) -> list[GeneratorTerms]:
        """The micro-batches of one optimizer step with the adaptive weight of the whole global batch.

        One weight for all of them, from the mean of the last layer's gradients over micro-batches and ranks: a step
        does not depend on how its batch was cut.
        """
        grads = [parts.last_layer_grads_2ED for parts in group]
        weight = torch.zeros_like(group[0].l1)
        if grads[0] is not None:
            reconstruction, adversarial = self.mean_over_ranks(sum(grads) / len(grads)).unbind(0)
            weight = adaptive_weight(reconstruction, adversarial, self.loss.max_d_weight)
        return [self._balanced(parts, weight) for parts in group]

    def _balanced(self, parts: GeneratorParts, weight: Tensor) -> GeneratorTerms:
        factor, grad = self.loss.disc_weight * weight, parts.grad_BNE
        if parts.adversarial_grad_BNE is not None:
            grad = grad + factor * parts.adversarial_grad_BNE
        total = parts.reconstruction + factor * parts.adversarial
        return GeneratorTerms(grad, parts.l1, parts.perceptual, parts.adversarial, weight, total)

    def _adversarial(self, image: Tensor, heads: nn.Module, draws: AugmentDraws) -> Tensor:
        """The generator's loss; the backward pass goes to the image and not to the heads, whose engine sees nothing."""
        assert self.backbone is not None
        state = {name: tensor.detach() for name, tensor in (*heads.named_parameters(), *heads.named_buffers())}
        was_training = heads.training
        heads.eval()
        with self.autocast():
            seen = self.augment(image * 2 - 1, draws.policy_3P[0], draws.u_3UB[0])
            loss = generator_loss(functional_call(heads, state, (self.backbone(seen),)))
        heads.train(was_training)
        return loss

    def discriminator(
        self,
        heads: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]],
        fake_B3HW: Tensor,
        real_B3HW: Tensor,
        draws: AugmentDraws,
    ) -> DiscriminatorTerms:
        """The discriminator's loss on images in [0, 1]; the fakes are put on the 8-bit grid first.

        Args:
            heads: activations of fake and real -> logits of fake and real.
            fake_B3HW: reconstructions by the updated decoder, without latent noise.
            real_B3HW: the originals.
            draws: augmentation draws.
        """
        assert self.backbone is not None
        with self.autocast():
            with torch.no_grad():
                fake = self.augment(discretized(fake_B3HW), draws.policy_3P[1], draws.u_3UB[1])
                real = self.augment(real_B3HW * 2 - 1, draws.policy_3P[2], draws.u_3UB[2])
                activations = self.backbone(torch.cat([fake, real]))
            halves = zip(*(both.chunk(2) for both in activations), strict=True)
            fake_logits, real_logits = heads(*halves)
            loss = self.discriminator_loss(real_logits, fake_logits)
        accuracy = (real_logits > fake_logits).to(loss.dtype).mean()
        return DiscriminatorTerms(loss, accuracy, real_logits.detach(), fake_logits.detach())


def discretized(image_B3HW: Tensor) -> Tensor:
    """Images of [0, 1] clamped and rounded to 8 bits, then in [-1, 1]: no tell-tale values between the grid's."""
    return (at_least_float32(image_B3HW).clamp(0, 1) * 255).round() / 127.5 - 1
