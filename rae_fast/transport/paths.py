"""Interpolation paths between data and noise, and the conversions between what a model may predict.

    x_t = alpha(t) * x1 + sigma(t) * x0,   x1 data, x0 ~ N(0, I),   t = 0 data, t = 1 noise
    velocity u_t = alpha'(t) * x1 + sigma'(t) * x0

(Ma et al., SiT, 2024, with the direction of time turned round.) Everything else follows from these two lines and the
Wronskian W = alpha * sigma' - alpha' * sigma, which is positive on every path here.

A time is a float32 tensor [B], one per sample, or a 0-d tensor for the whole batch. A 0-d tensor on the CPU takes
part in arithmetic on any device without synchronization, so samplers use those.

Shapes: B samples, CHW latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from rae_fast.errors import UserError, nearest


@dataclass(frozen=True)
class Coefficients:
    """Values of one path at one time (or at one time per sample)."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """W = alpha * sigma' - alpha' * sigma."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma


class Path(ABC):
    """A path is its alpha and sigma with their derivatives; the conversions are shared."""

    name: str

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their time derivatives, of the shape of t."""

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """Coefficients that broadcast against x [B, ...]: t is [B] or 0-d."""
        return self.coefficients(t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t)

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha * data + sigma * noise."""
        c = self.at(t, data)
        return c.alpha * data + c.sigma * noise

    def target_velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """u_t = alpha' * data + sigma' * noise."""
        c = self.at(t, data)
        return c.d_alpha * data + c.d_sigma * noise

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 = (alpha * v - alpha' * x) / W."""
        c = self.at(t, x)
        return (c.alpha * velocity - c.d_alpha * x) / c.wronskian

    def data_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x1 = (sigma' * x - sigma * v) / W; Tweedie's estimate when v is the marginal velocity."""
        c = self.at(t, x)
        return (c.d_sigma * x - c.sigma * velocity) / c.wronskian

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """score = -x0 / sigma; singular where sigma = 0 (t = 0 on Linear and GVP)."""
        return -self.noise_from_velocity(velocity, x, t) / self.at(t, x).sigma

    def velocity_from_noise(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (alpha' * x + W * x0) / alpha; singular where alpha = 0 (t = 1)."""
        c = self.at(t, x)
        return (c.d_alpha * x + c.wronskian * noise) / c.alpha

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (alpha' * x - W * sigma * score) / alpha; singular where alpha = 0 (t = 1)."""
        return self.velocity_from_noise(-self.at(t, x).sigma * score, x, t)

    def velocity_from_data(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (sigma' * x - W * x1) / sigma; singular where sigma = 0 (t = 0 on Linear and GVP)."""
        c = self.at(t, x)
        return (c.d_sigma * x - c.wronskian * data) / c.sigma

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Forward SDE with these marginals: (alpha'/alpha * x, g^2 / 2 = sigma * W / alpha).

        v = drift - g^2 / 2 * score (Song et al., 2021, eq. 13).
        """
        c = self.at(t, x)
        return c.d_alpha / c.alpha * x, c.sigma * c.wronskian / c.alpha


class LinearPath(Path):
    """alpha = 1 - t, sigma = t."""

    name = "Linear"

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)


class GVPPath(Path):
    """Variance preserving by angle: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name = "GVP"

    def coefficients(self, t: Tensor) -> Coefficients:
        angle = t * (pi / 2)
        cos, sin = torch.cos(angle), torch.sin(angle)
        return Coefficients(cos, sin, -sin * (pi / 2), cos * (pi / 2))


class VPPath(Path):
    """sigma = exp(m), alpha = sqrt(1 - sigma^2), m = -(1-t)^2 (b1 - b0) / 4 - (1-t) b0 / 2 with b0 = 0.1, b1 = 20.

    alpha' = -sigma * sigma' / alpha diverges at t = 1 (its integral does not), so derivatives are taken at
    min(t, 1 - 1e-5), the end of the reference's training interval.
    """

    name = "VP"
    beta_min = 0.1
    beta_max = 20.0
    end = 1.0 - 1e-5

    def coefficients(self, t: Tensor) -> Coefficients:
        sigma, alpha = self._sigma_alpha(t)
        inner = t.clamp(max=self.end)
        inner_sigma, inner_alpha = self._sigma_alpha(inner)
        d_sigma = inner_sigma * ((1 - inner) * ((self.beta_max - self.beta_min) / 2) + self.beta_min / 2)
        return Coefficients(alpha, sigma, -inner_sigma * d_sigma / inner_alpha, d_sigma)

    def _sigma_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rest = 1 - t
        log_sigma = -0.25 * rest**2 * (self.beta_max - self.beta_min) - 0.5 * rest * self.beta_min
        return torch.exp(log_sigma), torch.sqrt(-torch.expm1(2 * log_sigma))


PATHS: dict[str, type[Path]] = {path.name: path for path in (LinearPath, GVPPath, VPPath)}


def build_path(name: str) -> Path:
    """The path of that name (Linear, GVP, VP; upper or lower case).

    Raises:
        UserError: no such path.
    """
    known = {key.casefold(): path for key, path in PATHS.items()}
    if name.casefold() not in known:
        raise UserError(
            f"transport.params.path_type: {name!r}{nearest(name, PATHS)}", f"one of {', '.join(PATHS)}", "mend the key"
        )
    return known[name.casefold()]()
