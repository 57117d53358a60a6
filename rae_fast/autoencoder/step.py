"""One step of decoder training: the decoder's update, then the discriminator's on what the new decoder makes.

Shapes: B images of a micro-batch, N tokens of C channels, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.autoencoder.feed import DecoderBatch
from rae_fast.autoencoder.objective import DecoderObjective, Phase, augment_draws
from rae_fast.autoencoder.rae import add_latent_noise
from rae_fast.rng import Stream, normal, uniform
from rae_fast.training.engine import RECORD, Engine

SKIPPED = RECORD.index("skipped")
# What a step reports, in this order. `x/count` is 1 in steps in which x took part, else 0.
OPTIONAL_TERMS = ("perceptual", "adversarial", "adaptive_weight")
DISCRIMINATOR_TERMS = ("disc_loss", "disc_grad_norm", "disc_accuracy")
FIGURES = (
    *RECORD,
    "l1",
    *(f"{name}{end}" for name in (*OPTIONAL_TERMS, *DISCRIMINATOR_TERMS) for end in ("", "/count")),
)


class DecoderStep:
    """Updates both players on one group of micro-batches.

    Args:
        generator: engine around the bare decoder.
        discriminator: engine around the heads, or None without an adversarial loss.
        objective: both players' losses.
        tau: largest standard deviation of the latent noise in the decoder's update.
        seed: key of noise and augmentation.
    """

    def __init__(
        self, generator: Engine, discriminator: Engine | None, objective: DecoderObjective, *, tau: float, seed: int
    ) -> None:
        self.generator, self.discriminator, self.objective = generator, discriminator, objective
        self.tau, self.seed = tau, seed
        self._last_input = last_layer_input(generator.module)

    def __call__(self, group: Sequence[DecoderBatch], step: int, phase: Phase) -> Tensor:
        """Update on the micro-batches of one optimizer step.

        Args:
            group: this rank's micro-batches, as many as the engines accumulate.
            step: optimizer steps done before this one.
            phase: which parts are on.

        Returns:
            `FIGURES`, float64 on the device, over all ranks.
        """
        for batch in group:
            self._update_decoder(batch, step, phase)
        figures = self.generator.record.clone()
        if not phase.discriminator:
            return torch.cat([figures, figures.new_zeros(2 * len(DISCRIMINATOR_TERMS))])
        assert self.discriminator is not None
        for update in range(self.objective.loss.disc_updates):
            for batch in group:
                self._update_discriminator(batch, step * self.objective.loss.disc_updates + update)
        loss, norm, skipped, _, accuracy = self.discriminator.record.unbind()
        figures[SKIPPED] = torch.maximum(figures[SKIPPED], skipped)
        one = torch.ones_like(loss)
        return torch.cat([figures, torch.stack([loss, one, norm, one, accuracy, one])])

    def _update_decoder(self, batch: DecoderBatch, step: int, phase: Phase) -> None:
        draws = heads = None
        if phase.adversarial:
            assert self.discriminator is not None
            draws = augment_draws(self.seed, batch.epoch, step * self.objective.loss.disc_updates, batch.index_B)
            heads = self.discriminator.module
        patches_BNE = self.generator(self.noised(batch))
        terms = self.objective.generator(patches_BNE, self._last_input()[:, 1:], batch.images_B3SS, heads, draws, phase)
        self.generator.backward(terms.surrogate(patches_BNE))
        adversarial = torch.full_like(terms.l1, float(phase.adversarial))
        perceptual = torch.full_like(terms.l1, float(phase.perceptual))
        observed = [terms.l1, terms.perceptual, perceptual, terms.adversarial, adversarial]
        observed += [terms.adaptive_weight, adversarial]
        self.generator.observe(torch.stack(observed) / self._parts(self.generator))
        self.generator.step()

    @staticmethod
    def _parts(engine: Engine) -> int:
        """Micro-batches of all ranks in a step: the engine sums, the log wants means."""
        return engine.accumulation * engine.ranks.world

    def noised(self, batch: DecoderBatch) -> Tensor:
        """Tokens with latent noise: z + tau u n, drawn by (seed, epoch, sample)."""
        if self.tau <= 0:
            return batch.tokens_BNC
        draw = (self.seed, batch.epoch, batch.index_B)
        u_B = uniform(*draw, Stream.LATENT_NOISE_SCALE)
        n_BNC = normal(*draw, Stream.LATENT_NOISE, tuple(batch.tokens_BNC.shape[1:]))
        return add_latent_noise(batch.tokens_BNC, self.tau, u_B, n_BNC)

    def _update_discriminator(self, batch: DecoderBatch, update: int) -> None:
        assert self.discriminator is not None
        # The generator's update has used row 0 of the draws; rows 1 and 2 are for fake and real.
        draws = augment_draws(self.seed, batch.epoch, update, batch.index_B)
        with torch.no_grad(), self.generator.autocast():
            fake_B3SS = self.objective.to_pixels(self.generator.module(batch.tokens_BNC).float())
        terms = self.objective.discriminator(self.discriminator, fake_B3SS, batch.images_B3SS, draws)
        self.discriminator.backward(terms.loss)
        self.discriminator.observe(terms.accuracy.reshape(1) / self._parts(self.discriminator))
        self.discriminator.step()


def last_layer_input(decoder: nn.Module) -> Callable[[], Tensor]:
    """A function that gives what went into `decoder_pred` in the latest forward pass, [B, 1 + N, D]."""
    latest: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        latest[:] = [arguments[0].detach()]

    decoder.decoder_pred.register_forward_pre_hook(keep)
    return lambda: latest[0]
