"""How a latent becomes bytes: lossless (fp16), balanced (int8 with a scale per channel), compact (int8 and zstd).

Transforms run before writing and the store holds plain types, so that any zarr reader can read it.

Shapes: B samples, C channels, H x W tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum, log10, sqrt

import numpy as np
import torch
from torch import Tensor

from rae_fast.errors import UserError

INT8_MAX = 127
COMPACT_STEP = 0.1  # normalized latents have unit variance: 30.8 dB, and values beyond 12.7 clip
SMALLEST_SCALE = 2.0**-14  # smallest normal float16: a channel of zeros must not divide by zero
ZSTD_LEVEL = 1


@dataclass(frozen=True)
class Codec:
    """One way to store normalized latents.

    Attributes:
        name: as in `cache.codec`.
        dtype: stored element type, torch's and numpy's name of it.
        has_scale: a float16 scale per (sample, channel) lies beside the latents.
        compressed: each sample is a zstd frame, so its size varies.
        formula: how to get the latent back, for people with other readers.
    """

    name: str
    dtype: str
    has_scale: bool
    compressed: bool
    formula: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """Stored element type."""
        return getattr(torch, self.dtype)

    def encode(self, z_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """float32 [B, C, H, W] to stored values [B, C, H, W] and, for `balanced`, scales float16 [B, C].

        balanced: s = max|z| / 127 per (sample, channel), rounded to float16, q = round(z / s).
        compact: q = round(z / 0.1).
        """
        if self.name == "lossless":
            return z_BCHW.to(torch.float16), None
        if self.name == "balanced":
            peak_BC = z_BCHW.abs().amax(dim=(2, 3))
            scale_BC = (peak_BC / INT8_MAX).clamp_min(SMALLEST_SCALE).to(torch.float16)
            return _to_int8(z_BCHW / scale_BC.float()[:, :, None, None]), scale_BC
        return _to_int8(z_BCHW / COMPACT_STEP), None

    def decode(self, stored_BCHW: Tensor, scale_BC: Tensor | None = None) -> Tensor:
        """Stored values back to float32 [B, C, H, W], on their own device."""
        z_BCHW = _float32(stored_BCHW)
        if self.name == "balanced":
            assert scale_BC is not None
            return z_BCHW.mul_(scale_BC.float()[:, :, None, None])
        return z_BCHW.mul_(COMPACT_STEP) if self.name == "compact" else z_BCHW


def _float32(stored_BCHW: Tensor) -> Tensor:
    """A float32 copy; on the host in numpy's memory, for which it asks for huge pages: a quarter of the time."""
    if stored_BCHW.device.type != "cpu":
        return stored_BCHW.float()
    return torch.from_numpy(np.empty(stored_BCHW.shape, np.float32)).copy_(stored_BCHW)


def _to_int8(q_BCHW: Tensor) -> Tensor:
    return q_BCHW.round().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


CODECS = {
    codec.name: codec
    for codec in (
        Codec("lossless", "float16", has_scale=False, compressed=False, formula="z = stored"),
        Codec("balanced", "int8", has_scale=True, compressed=False, formula="z = stored * scale[sample, channel]"),
        Codec("compact", "int8", has_scale=False, compressed=True, formula=f"z = stored * {COMPACT_STEP}"),
    )
}


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UserError: there is none.
    """
    if name not in CODECS:
        raise UserError(f"codec {name!r}", f"one of {', '.join(CODECS)}")
    return CODECS[name]


class CodecError:
    """What a codec did to this very data: sums in float64, gathered shard by shard and added in shard order."""

    def __init__(self, signal: float = 0.0, error: float = 0.0, largest: float = 0.0) -> None:
        self.signal, self.error, self.largest = signal, error, largest

    def update(self, z_BCHW: Tensor, decoded_BCHW: Tensor) -> None:
        """Count one batch of latents and what they decode to."""
        difference_BCHW = z_BCHW - decoded_BCHW
        self.signal = fsum([self.signal, *_square_sums(z_BCHW)])
        self.error = fsum([self.error, *_square_sums(difference_BCHW)])
        low, high = difference_BCHW.aminmax()
        self.largest = max(self.largest, -float(low), float(high))

    def add(self, other: CodecError) -> None:
        """Add another shard's sums."""
        self.signal += other.signal
        self.error += other.error
        self.largest = max(self.largest, other.largest)

    def sums(self) -> dict[str, float]:
        """The sums, to be written down and added later."""
        return {"signal": self.signal, "error": self.error, "largest": self.largest}

    def report(self) -> dict[str, float | None]:
        """Relative RMS error, signal to noise in dB (None when exact) and the largest error."""
        if self.error == 0.0 or self.signal == 0.0:
            return {"relative_rms": 0.0, "snr_db": None, "max_error": self.largest}
        ratio = self.error / self.signal
        return {
            "relative_rms": float(f"{sqrt(ratio):.6g}"),
            "snr_db": round(-10 * log10(ratio), 3),
            "max_error": self.largest,
        }


def _square_sums(values_BCHW: Tensor) -> list[float]:
    """Sum of squares of each sample: in float32 over a channel's few values, then in float64.

    In an order that does not depend on how many threads share the work.
    """
    return values_BCHW.flatten(2).square().sum(2).sum(1, dtype=torch.float64).tolist()
