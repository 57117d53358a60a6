"""From a trained model to images: drawing, many of them over many ranks, grids, reconstructions."""

from rae_fast.sampling.sampler import (
    EXACT_BATCH,
    LatentSampler,
    decode_images,
    draw_images,
    draw_latents,
    load_sampler,
)

__all__ = ["EXACT_BATCH", "LatentSampler", "decode_images", "draw_images", "draw_latents", "load_sampler"]
