"""From noise to data along the reverse SDE.

Shapes: B samples, CHW latent; the state keeps the dtype of the noise given (use float32).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import cos, inf, pi, sin, sqrt

from torch import Tensor

from rae_fast.errors import UserError, nearest
from rae_fast.transport.grid import scalar, time_grid
from rae_fast.transport.objective import Transport, check_interval
from rae_fast.transport.paths import Path

Prediction = Callable[[Tensor, float], Tensor]  # (x_BCHW, t) -> the model's output_BCHW
NoiseFunction = Callable[[int], Tensor]  # step -> standard normal_BCHW

# An explicit step of size h follows the relaxation towards the marginal, at rate D / sigma^2, only while h D / sigma^2
# is small. Any D >= 0 leaves the marginals unchanged, so D is lowered to what the step can follow; the bound vanishes
# as h -> 0. On the reference's grid, forms that are finite there stay as they are, to end where it ends.
RELAXATION_LIMIT = 0.25
UNBOUNDED_IN_REFERENCE = ("sbdm", "constant")

DIFFUSION_FORMS: dict[str, Callable[[Path, float, float], float]] = {
    "sbdm": lambda path, t, norm: norm * _half_squared_diffusion(path, t),
    "constant": lambda path, t, norm: norm,
    "sigma": lambda path, t, norm: norm * path.coefficients(scalar(t)).sigma.item(),
    "linear": lambda path, t, norm: norm * t,
    "decreasing": lambda path, t, norm: 0.25 * (1 - norm * cos(pi * t)) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * sin(pi * t) ** 2,
}
LAST_STEPS = ("none", "mean", "tweedie", "euler")


def diffusion(path: Path, form: str, t: float, norm: float = 1.0) -> float:
    """Diffusion D(t) of the reverse SDE dx = (v + D x0 / sigma) dt + sqrt(2 D) dw (Ma et al. 2024, section 2.4).

    Forms: SBDM (that of the forward SDE), constant, sigma, linear, decreasing, increasing-decreasing.

    Raises:
        UserError: unknown form.
    """
    # The reference spells it so, hence its files do.
    name = form.casefold().replace("inccreasing", "increasing")
    if name not in DIFFUSION_FORMS:
        raise UserError(
            f"sampler.params.diffusion_form: {form!r}{nearest(name, DIFFUSION_FORMS)}",
            f"one of {', '.join(DIFFUSION_FORMS)}",
        )
    return DIFFUSION_FORMS[name](path, t, norm)


def sample_sde(
    transport: Transport,
    prediction: Prediction,
    noise: Tensor,
    noise_function: NoiseFunction,
    *,
    method: str = "euler",
    num_steps: int = 250,
    grid: str = "reference",
    diffusion_form: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "Mean",
    last_step_size: float = 0.04,
) -> Tensor:
    """Integrate the reverse SDE from noise to data; its marginals are those of the ODE for every diffusion form.

    Euler: x - h (v + D x0 / sigma) + sqrt(2 D h) z, with x0 the predicted noise. Heun: the noise first, then Heun's
    rule on the drift. The last step, without noise: Mean (drift), Euler (velocity), Tweedie (predicted data), or None.

    Args:
        transport: path, prediction and shift.
        prediction: (x, t) -> the model's output, one call per evaluation.
        noise: float32 [B, ...].
        noise_function: step -> standard normal like `noise`; per-sample seeds live there.
        method: euler or heun.
        num_steps: grid reference: num_steps - 1 noisy steps to t = last_step_size (shifted), then the last step as if
            at the unshifted last_step_size, as the reference does; full: num_steps steps in all, ending at t = 0.
        grid: reference or full.
        diffusion_form: see `diffusion`.
        diffusion_norm: factor of the form.
        last_step: Mean, Tweedie, Euler or None.
        last_step_size: what is left to the last step; unused without one.

    Raises:
        UserError: unknown method, form, grid or last step.
    """
    last = str(last_step).casefold()
    for key, value, known in (("sampling_method", method.casefold(), SDE_STEP), ("last_step", last, LAST_STEPS)):
        if value not in known:
            raise UserError(f"sampler.params.{key}: {value!r}{nearest(value, known)}", f"one of {', '.join(known)}")
    exact = grid == "reference" and diffusion_form.casefold() not in UNBOUNDED_IN_REFERENCE
    limit = inf if exact else RELAXATION_LIMIT
    sde = _ReverseSDE(transport, prediction, diffusion_form, diffusion_norm, limit)
    size = 0.0 if last == "none" else last_step_size
    times, t_last = _sde_times(transport, num_steps, grid, diffusion_form, size)
    x = noise
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = SDE_STEP[method.casefold()](sde, x, t, t_next, noise_function(step))
    return x if last == "none" else sde.last_step(last, x, t_last)


def _sde_times(
    transport: Transport, num_steps: int, grid: str, form: str, last_step_size: float
) -> tuple[list[float], float]:
    """Times of the noisy steps, and the time from which the last step is taken."""
    low, high = check_interval(
        transport.path.name,
        transport.prediction,
        transport.sample_eps,
        sde=True,
        diffusion_form=form,
        last_step_size=last_step_size,
    )
    low = max(low, transport.sampling_interval(grid)[0])
    if grid != "full":
        return time_grid(num_steps, grid, transport.shift, (low, high)), last_step_size
    if not last_step_size:
        return time_grid(num_steps, grid, transport.shift, (low, 1.0)), 0.0
    times = time_grid(num_steps, "reference", transport.shift, (low, 1 - last_step_size))
    return times, times[-1]


class _ReverseSDE:
    """Drift and diffusion at a time, from one model call."""

    def __init__(self, transport: Transport, prediction: Prediction, form: str, norm: float, limit: float) -> None:
        self.transport, self.prediction, self.form, self.norm, self.limit = transport, prediction, form, norm, limit

    def diffusion(self, t: float, h: float) -> float:
        """D(t), no more than a step of size h can follow."""
        sigma = self.transport.path.coefficients(scalar(t)).sigma.item()
        return min(diffusion(self.transport.path, self.form, t, self.norm), self.limit * sigma**2 / h)

    def velocity_and_noise(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The model's velocity and noise at (x, t)."""
        return self.transport.velocity_and_noise(self.prediction(x, t), x, scalar(t))

    def drift(self, x: Tensor, t: float, h: float) -> Tensor:
        """dx/dt without noise: v + D x0 / sigma."""
        velocity, noise = self.velocity_and_noise(x, t)
        sigma = self.transport.path.coefficients(scalar(t)).sigma.item()
        return velocity + self.diffusion(t, h) / sigma * noise

    def last_step(self, kind: str, x: Tensor, t: float) -> Tensor:
        """Noiseless step from t to data."""
        if kind == "mean":
            return x - t * self.drift(x, t, t)
        velocity, _ = self.velocity_and_noise(x, t)
        if kind == "euler":
            return x - t * velocity
        return self.transport.path.data_from_velocity(velocity, x, scalar(t))


def _euler_maruyama(sde: _ReverseSDE, x: Tensor, t: float, t_next: float, z: Tensor) -> Tensor:
    h = t - t_next
    return x - h * sde.drift(x, t, h) + sqrt(2 * sde.diffusion(t, h) * h) * z


def _stochastic_heun(sde: _ReverseSDE, x: Tensor, t: float, t_next: float, z: Tensor) -> Tensor:
    if sde.transport.path.coefficients(scalar(t_next)).sigma == 0:
        # The score is not defined where there is no noise left, so there is nothing to average with.
        return _euler_maruyama(sde, x, t, t_next, z)
    h = t - t_next
    x = x + sqrt(2 * sde.diffusion(t, h) * h) * z
    k1 = sde.drift(x, t, h)
    k2 = sde.drift(x - h * k1, t_next, h)
    return x - h / 2 * (k1 + k2)


SDE_STEP = {"euler": _euler_maruyama, "heun": _stochastic_heun}


def _half_squared_diffusion(path: Path, t: float) -> float:
    """g^2 / 2 of the forward SDE; infinite at t = 1."""
    c = path.coefficients(scalar(t))
    return (c.sigma * c.wronskian / c.alpha).item() if c.alpha > 0 else inf
