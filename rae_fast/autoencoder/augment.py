"""Differentiable augmentation of what the discriminator sees (DiffAugment, Zhao et al., NeurIPS 2020).

Shapes: B images, C = 3 channels, H x W pixels; P = 3 policies in the order translation, colour, cutout.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRANSLATION = 0.125  # largest shift, as a share of the side
DRAWS = 7  # uniforms that one image needs: shift y, shift x, brightness, saturation, contrast, cutout y, cutout x


class DiffAugment:
    """Translation, colour and cutout, each applied to the whole batch with probability `prob`.

    Args:
        prob: chance of each policy; a negative value means its absolute value, without cutout.
        cutout: side of the square that is blanked, as a share of the image's side.
    """

    def __init__(self, prob: float = 1.0, cutout: float = 0.0) -> None:
        self.prob = abs(prob)
        self.cutout = cutout if prob > 0 else 0.0

    def __call__(self, x_BCHW: Tensor, policy_P: Tensor, u_7B: Tensor) -> Tensor:
        """Augment float32 images in [-1, 1]; values may leave that range.

        Args:
            x_BCHW: images; gradients flow back to them.
            policy_P: [3] uniforms **on the CPU** that decide which policies act, so that no device has to wait.
            u_7B: [7, B] uniforms in [0, 1) on the images' device.
        """
        if self.prob < 1e-6:
            return x_BCHW
        translate, colour, cut = (policy_P <= self.prob).tolist()
        if translate:
            x_BCHW = _translated(x_BCHW, u_7B[0], u_7B[1])
        if colour:
            x_BCHW = _recoloured(x_BCHW, u_7B[2], u_7B[3], u_7B[4])
        if cut and self.cutout > 0:
            x_BCHW = _with_hole(x_BCHW, u_7B[5], u_7B[6], self.cutout)
        return x_BCHW


def _translated(x_BCHW: Tensor, u_y_B: Tensor, u_x_B: Tensor) -> Tensor:
    """Shift by whole pixels, up to TRANSLATION of the side each way, black beyond the border."""
    count, channels, height, width = x_BCHW.shape
    row_BH, inside_BH = _shifted(u_y_B, height)
    column_BW, inside_BW = _shifted(u_x_B, width)
    source = (row_BH[:, :, None] * width + column_BW[:, None, :]).reshape(count, 1, -1)
    inside = inside_BH[:, None, :, None] & inside_BW[:, None, None, :]
    moved = x_BCHW.flatten(2).gather(2, source.expand(-1, channels, -1))
    return moved.reshape(x_BCHW.shape) * inside


def _shifted(u_B: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where each of `side` positions comes from, int64 [B, side], and whether that lies in the image.

    The shift is a whole number in [-d, d] with d = round(TRANSLATION * side).
    """
    largest = round(TRANSLATION * side)
    shift_B = (u_B * (2 * largest + 1)).floor().long() - largest
    source = torch.arange(side, device=u_B.device) + shift_B[:, None]
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def _recoloured(x_BCHW: Tensor, brightness_B: Tensor, saturation_B: Tensor, contrast_B: Tensor) -> Tensor:
    """Brightness +(u - 0.5), saturation x 2u about the grey value, contrast x (u + 0.5) about the image's mean."""
    x_BCHW = x_BCHW + (brightness_B - 0.5)[:, None, None, None]
    grey = x_BCHW.mean(dim=1, keepdim=True)
    x_BCHW = (x_BCHW - grey) * (2 * saturation_B)[:, None, None, None] + grey
    mean = x_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    return (x_BCHW - mean) * (contrast_B + 0.5)[:, None, None, None] + mean


def _with_hole(x_BCHW: Tensor, u_y_B: Tensor, u_x_B: Tensor, share: float) -> Tensor:
    """Blank one rectangle of `share` of each side, centred anywhere in the image."""
    height, width = x_BCHW.shape[-2:]
    hole_BHW = _hole(u_y_B, height, share)[:, :, None] & _hole(u_x_B, width, share)[:, None, :]
    return x_BCHW * ~hole_BHW[:, None]


def _hole(u_B: Tensor, side: int, share: float) -> Tensor:
    """Which of `side` positions lie in the hole, bool [B, side]."""
    length = round(share * side)
    first_B = (u_B * (side + 1 - length % 2)).floor().long() - length // 2
    position = torch.arange(side, device=u_B.device)
    return (position >= first_B[:, None]) & (position < first_B[:, None] + length)
