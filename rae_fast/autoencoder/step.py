"""One step of decoder training: the decoder's update, then the discriminator's on what the new decoder makes.

Shapes: B images of a micro-batch, N tokens of C channels, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae_fast.autoencoder.batch import DecoderBatch
from rae_fast.autoencoder.losses import at_least_float32
from rae_fast.autoencoder.objective import DecoderObjective, GeneratorParts, GeneratorTerms, Phase, augment_draws
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

    A step does not depend on how its global batch is cut into ranks and micro-batches, but for the rounding of sums.

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
        self._update_decoder(group, step, phase)
        figures = self.generator.record.clone()
        if not phase.discriminator:
            return torch.cat([figures, figures.new_zeros(2 * len(DISCRIMINATOR_TERMS))])
        assert self.discriminator is not None
        updates = self.objective.loss.disc_updates
        for update in range(step * updates, (step + 1) * updates):
            self._update_discriminator(group, update)
        loss, norm, skipped, _, accuracy = self.discriminator.record.unbind()
        figures[SKIPPED] = torch.maximum(figures[SKIPPED], skipped)
        one = torch.ones_like(loss)
        return torch.cat([figures, torch.stack([loss, one, norm, one, accuracy, one])])

    # --- the decoder ------------------------------------------------------------------------------------------------

    def _update_decoder(self, group: Sequence[DecoderBatch], step: int, phase: Phase) -> None:
        ready: list[GeneratorTerms] = []
        if phase.adversarial and len(group) > 1:
            # The adaptive weight is that of all micro-batches, and must be known before the first one's backward pass:
            # one more forward pass of the decoder, whose outputs' gradients are kept instead of its activations.
            ready = self.objective.balanced([self._parts(self._decoded(b), b, step, phase) for b in group])
        for i, batch in enumerate(group):
            patches_BNE = self.generator(self.noised(batch))
            if ready:
                terms = ready[i]
            else:
                (terms,) = self.objective.balanced([self._parts(patches_BNE, batch, step, phase)])
            self.generator.backward(terms.surrogate(patches_BNE))
            self.generator.observe(self._observed(terms, phase))
            self.generator.step()

    @torch.no_grad()
    def _decoded(self, batch: DecoderBatch) -> Tensor:
        with self.generator.autocast():
            return self.generator.module(self.noised(batch))

    def _parts(self, patches_BNE: Tensor, batch: DecoderBatch, step: int, phase: Phase) -> GeneratorParts:
        draws = heads = None
        if phase.adversarial:
            assert self.discriminator is not None
            draws = augment_draws(self.seed, batch.epoch, step * self.objective.loss.disc_updates, batch.index_B)
            heads = self.discriminator.module
        last_input_BND = self._last_input()[:, 1:]
        return self.objective.generator(patches_BNE, last_input_BND, batch.images_B3SS, heads, draws, phase)

    def _observed(self, terms: GeneratorTerms, phase: Phase) -> Tensor:
        adversarial = torch.full_like(terms.l1, float(phase.adversarial))
        perceptual = torch.full_like(terms.l1, float(phase.perceptual))
        observed = [terms.l1, terms.perceptual, perceptual, terms.adversarial, adversarial]
        observed += [terms.adaptive_weight, adversarial]
        return torch.stack(observed) / self._shares(self.generator)

    @staticmethod
    def _shares(engine: Engine) -> int:
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

    # --- the discriminator ------------------------------------------------------------------------------------------

    def _update_discriminator(self, group: Sequence[DecoderBatch], update: int) -> None:
        assert self.discriminator is not None
        vectors = list(self.discriminator.module.buffers())
        before = [vector.clone() for vector in vectors]
        for i, batch in enumerate(group):
            if i:
                # Every micro-batch makes the step's power iterations, and none but them.
                for vector, value in zip(vectors, before, strict=True):
                    vector.copy_(value)
            # The generator's update has used row 0 of the draws; rows 1 and 2 are for fake and real.
            draws = augment_draws(self.seed, batch.epoch, update, batch.index_B)
            with torch.no_grad(), self.generator.autocast():
                fake_B3SS = self.objective.to_pixels(at_least_float32(self.generator.module(batch.tokens_BNC)))
            terms = self.objective.discriminator(self.discriminator, fake_B3SS, batch.images_B3SS, draws)
            self.discriminator.backward(terms.loss)
            self.discriminator.observe(terms.accuracy.reshape(1) / self._shares(self.discriminator))
            self.discriminator.step()


def last_layer_input(decoder: nn.Module) -> Callable[[], Tensor]:
    """A function that gives what went into `decoder_pred` in the latest forward pass, [B, 1 + N, D]."""
    latest: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        latest[:] = [arguments[0].detach()]

    decoder.decoder_pred.register_forward_pre_hook(keep)
    return lambda: latest[0]
