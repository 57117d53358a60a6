"""Embeddings of the diffusion transformers: patches, timestep, label and rotary positions.

Shapes: B samples, C latent channels, H and W latent sides, N tokens, D width, P head width.
Tables and timestep mathematics stay in float32 (or float64) whatever the parameters' type: bfloat16 has eight bits of
mantissa, too few for an angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOW_PRECISION = (torch.bfloat16, torch.float16)
FOURIER_SIZE = 256
ROPE_THETA = 10_000.0
TABLE_STD = 0.02


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged where it is float64."""
    return x.float() if x.dtype in LOW_PRECISION else x


def keep_fp32(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`convert` as `nn.Module._apply` gets it, except that it moves tensors without rounding them to 16 bits."""

    def apply(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        return tensor.to(converted.device) if converted.dtype in LOW_PRECISION else converted

    return apply


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens in row-major order: [B, C, H, W] -> [B, N, D].

    Args:
        wide: compute in float32 or above in every mode. This is for the trunk, whose residual stream is float32: the
            rounding of its first tokens would be the largest single error of a bfloat16 pass, at 0.1 % of its work.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int, *, wide: bool = False) -> None:
        super().__init__()
        self.patch_size, self.wide = patch_size, wide
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Tokens [B, N, D]."""
        convolve = self.patch_size > 1 or self._as_reference(x_BCHW.device.type)
        if self.wide:
            with torch.autocast(x_BCHW.device.type, enabled=False):
                return self._project(x_BCHW, at_least_fp32(self.proj.weight), at_least_fp32(self.proj.bias), convolve)
        return self._project(x_BCHW, self.proj.weight, self.proj.bias, convolve)

    def _as_reference(self, device: str) -> bool:
        """Whether to sum in the reference's order, to the last digit: where a float32 pass is compared with its own.

        That goes for a CPU in full precision. There the convolution's strided result makes all linear maps behind it
        add their bias after the product; in 16 bits that would be one rounding more.
        """
        return device == "cpu" and not torch.is_autocast_enabled("cpu") and self.proj.weight.dtype not in LOW_PRECISION

    def _project(self, x_BCHW: Tensor, weight: Tensor, bias: Tensor, convolve: bool) -> Tensor:
        x_BCHW = x_BCHW.to(weight.dtype)
        if convolve:
            return F.conv2d(x_BCHW, weight, bias, stride=self.patch_size).flatten(2).transpose(1, 2)
        # A 1 x 1 convolution is a linear map of each position: one GEMM on a transposed view, no layout change.
        return F.linear(x_BCHW.flatten(2).transpose(1, 2), weight.flatten(1), bias)

    def reset_parameters(self) -> None:
        """Xavier-uniform on the weight seen as a matrix; zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        nn.init.zeros_(self.proj.bias)


class WideLinear(nn.Linear):
    """A linear map computed in float32 or above, whatever the parameters' type and autocast say."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight, bias = at_least_fp32(self.weight), at_least_fp32(self.bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight, bias)


class OwnTypeLinear(nn.Linear):
    """A linear map computed in the type of its weights, whatever autocast says.

    For maps of one row a sample, whose time is that of reading the weights: casting them would cost more than it saves.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class TimestepEmbed(nn.Module):
    """Gaussian Fourier features through a two-layer perceptron, in float32 or above.

    e(t) = L2(silu(L0([sin(2 pi t W), cos(2 pi t W)]))), W ~ N(0, 1) of size 256.
    The output depends on t some ten to a hundred times more strongly than on anything else, and this is one row a
    sample (1e-5 of a pass): so it keeps float32 in every mode. Factors are multiplied in the reference's order, as the
    rounding of an angle, too, comes out a hundredfold.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(FOURIER_SIZE), requires_grad=False)
        self.mlp = nn.Sequential(WideLinear(2 * FOURIER_SIZE, width), nn.SiLU(), WideLinear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Embedding [B, D] of times in [0, 1], float32 or float64."""
        frequencies = at_least_fp32(self.W)
        angle = t_B.to(frequencies.dtype)[:, None] * frequencies[None, :] * 2 * math.pi
        return self.mlp(torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1))

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02 in the perceptron."""
        nn.init.normal_(self.mlp[0].weight, std=TABLE_STD)
        nn.init.normal_(self.mlp[2].weight, std=TABLE_STD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimestepEmbed:
        if recurse:
            self.mlp._apply(fn)
        # Frequencies that an optimizer owns must have the type of its other parameters; fixed ones keep all their bits.
        return super()._apply(fn if self.W.requires_grad else keep_fp32(fn), recurse=False)


class LabelEmbed(nn.Module):
    """Class embedding with label dropout to the null label, whose index is `num_classes`."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)

    def forward(self, y_B: Tensor, labeldrop_u_B: Tensor | None = None) -> Tensor:
        """Embedding [B, D] of int64 labels.

        Args:
            y_B: labels in [0, num_classes], num_classes meaning "no class".
            labeldrop_u_B: uniforms in [0, 1); in training a label is dropped where u < dropout_prob. Drawn when absent.
        """
        if self.training and self.dropout_prob > 0:
            u_B = torch.rand(y_B.shape, device=y_B.device) if labeldrop_u_B is None else labeldrop_u_B
            y_B = torch.where(u_B < self.dropout_prob, self.num_classes, y_B)
        return self.embedding_table(y_B)

    def reset_parameters(self) -> None:
        """Normal of standard deviation 0.02."""
        nn.init.normal_(self.embedding_table.weight, std=TABLE_STD)


class RotaryTable(nn.Module):
    """Two-dimensional rotary positions for one head width, as cosines and sines [N, P].

    Channels rotate in interleaved pairs (2i, 2i+1); the first half of the head encodes the row, the second the column,
    at frequencies 10000^(-4i/P).
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_width: int, grid: int) -> None:
        super().__init__()
        half = head_width // 2
        frequency = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2).float() / half)
        angle = torch.arange(grid).float()[:, None] * frequency[None, :]
        angle = angle.repeat_interleave(2, dim=-1)
        row = angle[:, None, :].expand(-1, grid, -1)
        column = angle[None, :, :].expand(grid, -1, -1)
        angle = torch.cat([row, column], dim=-1).reshape(grid * grid, head_width)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self) -> tuple[Tensor, Tensor]:
        """(cosines, sines), each [N, P]."""
        return self.freqs_cos, self.freqs_sin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        return super()._apply(keep_fp32(fn), recurse)


def rotate(x: Tensor, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """Apply rotary positions to [..., N, P] in float32 or above.

    x' = x cos + J x sin, with J (x0, x1) = (-x1, x0) on each interleaved pair (Su et al., arXiv 2104.09864).
    """
    x = at_least_fp32(x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # As products of complex numbers it takes half the time; compilers and XLA would not fuse those.
        factors = torch.complex(cos_NP[..., ::2], sin_NP[..., ::2])
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * factors).flatten(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos_NP + turned * sin_NP
