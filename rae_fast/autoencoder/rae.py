"""The representation autoencoder: a frozen encoder, normalized latents, a trained decoder (arXiv 2510.11690).

Shapes: B samples, C latent channels, H and W latent sides (or image sides, for images), N tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rae_fast.autoencoder.decoder import ViTDecoder, load_decoder_config, load_decoder_weights
from rae_fast.encoders import FrozenEncoder, build_encoder, encoder_facts
from rae_fast.errors import UserError
from rae_fast.weights import read_statistics

if TYPE_CHECKING:
    from rae_fast.config import Stage1

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RAE(nn.Module):
    """Images to normalized latents and back.

    Args:
        encoder: frozen encoder, or None to decode only.
        decoder: decoder, or None to encode only.
        latent_mean: [C, H, W], subtracted; None means zero.
        latent_var: [C, H, W]; None means one if there is a mean, and no normalization if there is none either.
        noise_tau: in train mode z + tau u n is decoded, u uniform for each sample and n normal.
        eps: added to the variance.
        image_mean: the encoder's image mean (RGB); needed where there is no encoder.
        image_std: the encoder's image standard deviation.
    """

    latent_mean: Tensor | None
    latent_var: Tensor | None

    def __init__(
        self,
        encoder: FrozenEncoder | None,
        decoder: ViTDecoder | None,
        latent_mean: Tensor | None = None,
        latent_var: Tensor | None = None,
        noise_tau: float = 0.0,
        eps: float = 1e-5,
        *,
        image_mean: tuple[float, ...] = IMAGENET_MEAN,
        image_std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.noise_tau, self.eps = noise_tau, eps
        if encoder is not None:
            image_mean, image_std = encoder.image_mean, encoder.image_std
        # Not part of the state dict: the reference's has only the encoder's and the decoder's tensors.
        self.register_buffer("latent_mean", None if latent_mean is None else latent_mean.float(), persistent=False)
        self.register_buffer("latent_var", None if latent_var is None else latent_var.float(), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(image_mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(image_std).reshape(1, 3, 1, 1), persistent=False)

    def encode(self, images_B3HW: Tensor, *, noise_u: Tensor | None = None, noise_n: Tensor | None = None) -> Tensor:
        """Normalized latents [B, C, H, W] of images in [0, 1]; noised in train mode if noise_tau > 0.

        Args:
            images_B3HW: square images.
            noise_u: uniforms [B], drawn when absent.
            noise_n: standard normal [B, N, C] in token order, drawn when absent.
        """
        return self.normalize(self.encode_raw(images_B3HW, noise_u=noise_u, noise_n=noise_n))

    def encode_raw(
        self, images_B3HW: Tensor, *, noise_u: Tensor | None = None, noise_n: Tensor | None = None
    ) -> Tensor:
        """Latents before normalization, [B, C, H, W]; arguments as `encode`."""
        if self.encoder is None:
            raise UserError("this autoencoder was built without its encoder", "an encoder", "set need_encoder=True")
        tokens_BNC = self.encoder(images_B3HW)
        if self.training and self.noise_tau > 0:
            tokens_BNC = add_latent_noise(tokens_BNC, self.noise_tau, noise_u, noise_n)
        grid = self.encoder.grid
        return tokens_BNC.transpose(1, 2).unflatten(2, (grid, grid))

    def normalize(self, z_BCHW: Tensor) -> Tensor:
        """(z - mean) / sqrt(var + eps)."""
        if self.latent_mean is not None:
            z_BCHW = z_BCHW - self.latent_mean
        return z_BCHW if self._unnormalized else z_BCHW / self._latent_std()

    def denormalize(self, z_BCHW: Tensor) -> Tensor:
        """z sqrt(var + eps) + mean."""
        if not self._unnormalized:
            z_BCHW = z_BCHW * self._latent_std()
        return z_BCHW if self.latent_mean is None else z_BCHW + self.latent_mean

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] of normalized latents, about [0, 1] but not clamped."""
        return self.decode_tokens(self.denormalize(z_BCHW).flatten(2).transpose(1, 2))

    def decode_tokens(self, tokens_BNC: Tensor) -> Tensor:
        """Images [B, 3, H, W] of tokens before normalization."""
        if self.decoder is None:
            raise UserError("this autoencoder was built without its decoder", "a decoder", "set need_decoder=True")
        return self.patches_to_pixels(self.decoder(tokens_BNC))

    def patches_to_pixels(self, patches_BNE: Tensor) -> Tensor:
        """Images [B, 3, H, W] of the decoder's output [B, N, P P 3]."""
        assert self.decoder is not None
        return self.decoder.unpatchify(patches_BNE) * self.pixel_std + self.pixel_mean

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Reconstructions of images in [0, 1]."""
        return self.decode(self.encode(images_B3HW))

    @property
    def _unnormalized(self) -> bool:
        return self.latent_mean is None and self.latent_var is None

    def _latent_std(self) -> Tensor:
        var = torch.ones((), device=self.pixel_std.device) if self.latent_var is None else self.latent_var
        return torch.sqrt(var + self.eps)


def add_latent_noise(
    tokens_BNC: Tensor, tau: float, noise_u: Tensor | None = None, noise_n: Tensor | None = None
) -> Tensor:
    """z + tau u n, the noise augmentation of decoder training (RAE, section 3).

    Args:
        tokens_BNC: latents before normalization.
        tau: largest standard deviation of the noise.
        noise_u: uniforms [B] (or of B elements), drawn when absent.
        noise_n: standard normal [B, N, C], drawn when absent.
    """
    u = torch.rand(len(tokens_BNC), device=tokens_BNC.device) if noise_u is None else noise_u
    n_BNC = torch.randn_like(tokens_BNC) if noise_n is None else noise_n
    return tokens_BNC + tau * u.reshape(-1, 1, 1) * n_BNC


def build_rae(stage1: Stage1, *, need_encoder: bool = True, need_decoder: bool = True) -> RAE:
    """The autoencoder of a config, with its weights.

    Args:
        stage1: the `stage_1` section.
        need_encoder: load the encoder; else only its sizes and image statistics are looked up, without a network.
        need_decoder: build the decoder and load its weights, if the config names any.

    Raises:
        UserError: a file is missing or does not fit, with its key.
    """
    params = stage1.params
    source = {"params": params.encoder_params, "config_path": params.encoder_config_path}
    encoder = None
    if need_encoder:
        encoder = build_encoder(params.encoder_cls, input_size=params.encoder_input_size, **source)
    facts = encoder.facts if encoder is not None else encoder_facts(params.encoder_cls, **source)
    grid = facts.grid(params.encoder_input_size)
    mean, var = None, None
    if params.normalization_stat_path is not None:
        mean, var = read_statistics(params.normalization_stat_path, (facts.hidden_size, grid, grid))
    return RAE(
        encoder,
        _build_decoder(stage1, facts.hidden_size, grid) if need_decoder else None,
        mean,
        var,
        noise_tau=params.noise_tau,
        eps=params.eps,
        image_mean=facts.image_mean,
        image_std=facts.image_std,
    )


def _build_decoder(stage1: Stage1, hidden_size: int, grid: int) -> ViTDecoder:
    params = stage1.params
    if params.decoder_config_path is None:
        raise UserError("stage_1.params.decoder_config_path is not set", "a decoder's config.json, its folder or name")
    config = load_decoder_config(params.decoder_config_path)
    decoder = ViTDecoder(replace(config, hidden_size=hidden_size, grid=grid, patch_size=params.decoder_patch_size))
    # As in the reference, a training checkpoint wins over the decoder it may have started from.
    weights = stage1.ckpt or params.pretrained_decoder_path
    if weights is not None:
        load_decoder_weights(decoder, weights)
    return decoder
