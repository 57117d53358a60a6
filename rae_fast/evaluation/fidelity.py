"""What a store's codec costs in pixels: the decoder and the distances that `latents.compare` measures with.

Shapes: B images, C, H, W of a latent, S side of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae_fast.autoencoder.losses import find_vgg_weights, load_lpips
from rae_fast.autoencoder.rae import build_rae
from rae_fast.config import Config
from rae_fast.evaluation.reconstruction import psnr
from rae_fast.latents.compare import Decode, Distance
from rae_fast.latents.store import LatentStore


def store_decoder(config: Config, store: LatentStore) -> Decode | None:
    """The config's decoder as a function of the store's normalized latents; None if the config names no weights.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    if config.stage_1.params.pretrained_decoder_path is None and config.stage_1.ckpt is None:
        return None
    rae = build_rae(config.stage_1, need_encoder=False).eval()

    @torch.no_grad()
    def decode(z_BCHW: Tensor) -> Tensor:
        return rae.decode_tokens(store.denormalize(z_BCHW).flatten(2).transpose(1, 2))

    return decode


def pixel_distances(config: Config) -> dict[str, Distance]:
    """PSNR in dB, and LPIPS where VGG's weights are on this machine."""
    measures: dict[str, Distance] = {"psnr_db": psnr}
    if find_vgg_weights(config.gan.loss.lpips_weights) is not None:
        lpips = load_lpips(config.gan.loss.lpips_weights)

        def distance(a_B3SS: Tensor, b_B3SS: Tensor) -> Tensor:
            return torch.stack([lpips(a[None], b[None]) for a, b in zip(a_B3SS, b_B3SS, strict=True)])

        measures["lpips"] = distance
    return measures
