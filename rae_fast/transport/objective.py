"""Flow matching: which times are trained, what the loss of a sample is, how a prediction becomes a velocity.

Shapes: B samples, CHW latent; per-sample losses are float32 [B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, prod, sqrt

import torch
from torch import Tensor

from rae_fast.config import Config, TransportParams
from rae_fast.errors import UserError, nearest
from rae_fast.transport.paths import Path, build_path

ModelFunction = Callable[[Tensor, Tensor], Tensor]  # (x_BCHW, t_B) -> prediction_BCHW

PREDICTIONS = ("velocity", "noise", "score", "data")
LOSS_WEIGHTS = ("none", "velocity", "likelihood")
# A data prediction's velocity loss weighs its error by (W / sigma)^2. Below this sigma the weight stays constant
# (Li & He, "Back to Basics", 2025, clip the same denominator at the same value).
DATA_SIGMA_FLOOR = 0.05


def shift_from_size(dim: int, base: int = 4096) -> float:
    """Time shift sqrt(dim / base) for latents of `dim` values (Esser et al., SD3, 2024, eq. 23)."""
    return sqrt(dim / base)


def shift_time(t: Tensor | float, shift: float) -> Tensor | float:
    """t' = s t / (1 + (s - 1) t): more noise for s > 1, less for s < 1; the ends 0 and 1 stay exactly there."""
    return shift * t / ((1 - t) + shift * t)


@dataclass(frozen=True)
class TimeDistribution:
    """Uniform, or logit-normal with location and scale, both truncated to an interval."""

    location: float | None = None
    scale: float = 1.0

    @classmethod
    def parse(cls, name: str) -> TimeDistribution:
        """`uniform`, `logit-normal` or `logit-normal_<mu>_<sigma>`.

        Raises:
            UserError: neither of them.
        """
        kind, *numbers = name.split("_")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = [inf]
        if kind == "uniform" and not values:
            return cls()
        if kind == "logit-normal" and len(values) in (0, 2) and all(abs(v) < inf for v in values):
            location, scale = values or (0.0, 1.0)
            if scale > 0:
                return cls(location, scale)
        raise UserError(
            f"transport.params.time_dist_type: {name!r}",
            "'uniform' or 'logit-normal_<mu>_<sigma>' with sigma > 0, as logit-normal_0_1",
        )

    def sample(self, u_B: Tensor, low: float, high: float) -> Tensor:
        """Map uniforms to times in [low, high], float64.

        logit-normal: t = sigmoid(mu + sigma * Phi^-1(u')), with u' uniform on [Phi(a), Phi(b)] so that t is in range.
        """
        u = u_B.to(torch.float64)
        if self.location is None:
            return low + u * (high - low)
        start, end = self._quantile(low), self._quantile(high)
        # The quantile Phi^-1(p), by a function that XLA has, too.
        z = sqrt(2) * torch.erfinv(2 * (start + u * (end - start)) - 1)
        return torch.sigmoid(self.location + self.scale * z).clamp(low, high)

    def _quantile(self, t: float) -> float:
        """Phi((logit(t) - mu) / sigma): the probability of a time below t."""
        assert self.location is not None
        if t <= 0 or t >= 1:
            return 0.0 if t <= 0 else 1.0
        z = (log(t / (1 - t)) - self.location) / self.scale
        return torch.special.ndtr(torch.tensor(z, dtype=torch.float64)).item()


def check_interval(
    path: str,
    prediction: str,
    eps: float,
    *,
    sde: bool = False,
    diffusion_form: str = "sigma",
    last_step_size: float = 0.0,
    reverse: bool = False,
) -> tuple[float, float]:
    """The reference's interval of times; training samples t from it, sampling runs through 1 - t.

    Args:
        path: Linear, GVP or VP.
        prediction: what the model predicts.
        eps: distance kept from singular ends; the train or the sample eps.
        sde: for the SDE sampler, which leaves `last_step_size` to its last step.
        diffusion_form: of the SDE; SBDM keeps clear of the start, where its coefficient diverges.
        last_step_size: of the SDE.
        reverse: the interval of 1 - t instead.
    """
    low, high = 0.0, 1.0 - 1.0 / 1000
    if path == "VP":
        high = 1 - (last_step_size if sde and last_step_size else eps)
    elif prediction != "velocity" or sde:
        low = eps if prediction != "velocity" or diffusion_form.casefold() == "sbdm" else 0.0
        high = 1 - (last_step_size if sde and last_step_size else eps)
    return (1 - low, 1 - high) if reverse else (low, high)


class Transport:
    """One path, one kind of prediction, one distribution of times.

    Args:
        params: section `transport.params`.
        shift: time shift, of training and sampling alike; any positive number.

    Raises:
        UserError: an unknown name or a shift that is not positive.
    """

    def __init__(self, params: TransportParams | None = None, shift: float = 1.0) -> None:
        params = params or TransportParams()
        self.path: Path = build_path(params.path_type)
        self.prediction = _known("prediction", params.prediction, PREDICTIONS)
        self.loss_weight = _known("loss_weight", str(params.loss_weight).lower(), LOSS_WEIGHTS)
        if self.prediction == "data" and self.loss_weight == "likelihood":
            raise UserError("transport.params.loss_weight: 'likelihood' with prediction: data", "velocity or none")
        self.times = TimeDistribution.parse(params.time_dist_type)
        if not 0 < shift < inf:
            raise UserError(f"time shift {shift}", "a positive number", "check misc.time_dist_shift_dim and _base")
        self.shift = shift
        self.train_eps, self.sample_eps = self._resolve_eps(params)

    @classmethod
    def from_config(cls, config: Config, latent_size: tuple[int, ...]) -> Transport:
        """Transport of a config whose latents have the shape `latent_size`; shift = sqrt(dim / base) of `misc`."""
        dim = config.misc.time_dist_shift_dim or prod(latent_size)
        return cls(config.transport.params, shift_from_size(dim, config.misc.time_dist_shift_base))

    def _resolve_eps(self, params: TransportParams) -> tuple[float, float]:
        """Distances from singular ends: none for velocities on Linear and GVP, which have no singular end."""
        if self.path.name == "VP":
            train, sample = 1e-5, 1e-3
        elif self.prediction == "velocity":
            return 0.0, 0.0
        else:
            train, sample = 1e-3, 1e-3
        train = train if params.train_eps is None else params.train_eps
        sample = sample if params.sample_eps is None else params.sample_eps
        for name, value in (("train_eps", train), ("sample_eps", sample)):
            if not 0 <= value < 0.5:
                raise UserError(f"transport.params.{name}: {value}", "a number from 0 to 0.5")
        return train, sample

    def sampling_interval(self, grid: str = "reference") -> tuple[float, float]:
        """Interval of 1 - t for samplers.

        Noise and score predictions keep off t = 1, where alpha = 0. So does VP, whose velocity is infinite there, but
        on the reference's grid.
        """
        low, high = check_interval(self.path.name, self.prediction, self.sample_eps)
        singular = self.prediction in ("noise", "score") or (self.path.name == "VP" and grid != "reference")
        return (max(low, self.sample_eps) if singular else low), high

    def sample_time(self, u_B: Tensor) -> Tensor:
        """Map uniforms [B] in [0, 1) to training times, float32 [B], shifted."""
        low, high = check_interval(self.path.name, self.prediction, self.train_eps)
        return shift_time(self.times.sample(u_B, low, high), self.shift).to(torch.float32)

    def loss(self, model: ModelFunction, data_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Per-sample loss float32 [B]; see `loss_of` for the formula."""
        data, noise, t = data_BCHW.float(), noise_BCHW.float(), t_B.float()
        return self.loss_of(model(self.path.interpolate(data, noise, t), t), data, noise, t)

    def loss_of(self, prediction_BCHW: Tensor, data_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Mean over a sample's values of

        velocity: (m - u_t)^2;  noise: w (m - x0)^2;  score: w (sigma m + x0)^2;
        data: (W / max(sigma, 0.05))^2 (m - x1)^2, which is the velocity loss of v = (sigma' x - W m) / sigma;

        w = 1 (none), (W / alpha)^2 (velocity), W / (alpha sigma) (likelihood); Ma et al. 2024, section 3.
        """
        model, c = prediction_BCHW.float(), self.path.at(t_B, data_BCHW)
        if self.prediction == "velocity":
            return _mean_square(model - self.path.target_velocity(data_BCHW, noise_BCHW, t_B))
        if self.prediction == "data":
            return _mean_square(c.wronskian / c.sigma.clamp(min=DATA_SIGMA_FLOOR) * (model - data_BCHW))
        error = model - noise_BCHW if self.prediction == "noise" else c.sigma * model + noise_BCHW
        return self._noise_weight(t_B, data_BCHW).reshape(-1) * _mean_square(error)

    def _noise_weight(self, t_B: Tensor, x_BCHW: Tensor) -> Tensor:
        c = self.path.at(t_B, x_BCHW)
        if self.loss_weight == "velocity":
            return (c.wronskian / c.alpha) ** 2
        if self.loss_weight == "likelihood":
            return c.wronskian / (c.alpha * c.sigma)
        return torch.ones_like(c.alpha)

    def velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity that a prediction at (x, t) stands for, in the dtype of x."""
        prediction = prediction.to(x.dtype)
        if self.prediction == "velocity":
            return prediction
        convert = {
            "noise": self.path.velocity_from_noise,
            "score": self.path.velocity_from_score,
            "data": self.path.velocity_from_data,
        }
        return convert[self.prediction](prediction, x, t)

    def velocity_and_noise(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(velocity, x0) of a prediction; x0 = -sigma * score."""
        prediction = prediction.to(x.dtype)
        velocity = self.velocity(prediction, x, t)
        if self.prediction == "noise":
            return velocity, prediction
        if self.prediction == "score":
            return velocity, -self.path.at(t, x).sigma * prediction
        return velocity, self.path.noise_from_velocity(velocity, x, t)


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(dim=1)


def _known(key: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"transport.params.{key}: {value!r}{nearest(value, choices)}", f"one of {', '.join(choices)}")
    return value
