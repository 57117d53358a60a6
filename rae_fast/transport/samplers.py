"""From noise to data along the ODE, each step a function named after its algorithm; and the choice of sampler.

Shapes: B samples, CHW latent; the state keeps the dtype of the noise given (use float32).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from rae_fast.config import SamplerSection
from rae_fast.errors import UserError, nearest
from rae_fast.transport.adaptive import dopri5
from rae_fast.transport.grid import INTERVAL, scalar, time_grid
from rae_fast.transport.objective import Transport
from rae_fast.transport.sde import NoiseFunction, sample_sde

Velocity = Callable[..., Tensor]  # (x_BCHW, t) -> velocity_BCHW, t a float unless said otherwise


def euler(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """x + h v(x, t)."""
    return x + (t_next - t) * velocity(x, t)


def heun(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """Heun's second-order method: the trapezoid over an Euler prediction."""
    h = t_next - t
    k1 = velocity(x, t)
    k2 = velocity(x + h * k1, t_next)
    return x + h / 2 * (k1 + k2)


def midpoint(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """The explicit midpoint rule, second order."""
    h = t_next - t
    return x + h * velocity(x + h / 2 * velocity(x, t), t + h / 2)


def heun3(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """Heun's third-order method."""
    h = t_next - t
    k1 = velocity(x, t)
    k2 = velocity(x + h / 3 * k1, t + h / 3)
    k3 = velocity(x + 2 * h / 3 * k2, t + 2 * h / 3)
    return x + h / 4 * (k1 + 3 * k3)


def rk4(velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
    """Kutta's fourth-order 3/8 rule, which is what torchdiffeq, hence the reference, calls rk4."""
    h = t_next - t
    k1 = velocity(x, t)
    k2 = velocity(x + h * k1 / 3, t + h / 3)
    k3 = velocity(x + h * (k2 - k1 / 3), t + 2 * h / 3)
    k4 = velocity(x + h * (k1 - k2 + k3), t_next)
    return x + h / 8 * (k1 + 3 * (k2 + k3) + k4)


FIXED_STEP = {"euler": euler, "heun": heun, "heun2": heun, "midpoint": midpoint, "heun3": heun3, "rk4": rk4}
DATA_EPS = 1e-3  # as close to t = 0 as a velocity made of predicted data is asked for
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def sample_ode(
    velocity: Velocity,
    noise: Tensor,
    *,
    method: str = "euler",
    num_steps: int = 50,
    grid: str = "reference",
    shift: float = 1.0,
    interval: tuple[float, float] = INTERVAL,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    reverse: bool = False,
    singular_at_data: bool = False,
    trajectory: bool = False,
    per_sample: bool = False,
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from noise to data.

    Args:
        velocity: (x, t) -> dx/dt with t a Python float.
        noise: the state to start from, [B, ...].
        method: euler, heun, heun3, midpoint, rk4, or an adaptive method of torchdiffeq.
        num_steps: see `time_grid`; adaptive methods choose their own steps between the ends.
        grid: see `time_grid`.
        shift: see `time_grid`.
        interval: see `time_grid`.
        atol: absolute tolerance of adaptive methods.
        rtol: relative tolerance of adaptive methods.
        reverse: from data to noise, along the same times.
        singular_at_data: the velocity is not defined at t = 0, so a step that ends there is `euler`'s.
        trajectory: return the states at all times (fixed-step methods).
        per_sample: dopri5 gives each sample steps of its own; `velocity` then takes t as float64 [B], too.

    Returns:
        The state at the end, or with `trajectory` [times, B, ...].

    Raises:
        UserError: unknown method or grid.
    """
    times = time_grid(num_steps, grid, shift, interval)
    if reverse:
        times.reverse()
        times[0] = max(times[0], DATA_EPS) if singular_at_data else times[0]
    name = method.casefold()
    if name in ADAPTIVE:
        last = euler if singular_at_data and times[-1] == 0 else None
        ends = (times[0], DATA_EPS if last else times[-1])
        if name == "dopri5" and per_sample:
            x = dopri5(velocity, noise, *ends, atol, rtol)
        else:
            x = _sample_adaptive(velocity, noise, name, ends, atol, rtol, overshoot=grid == "reference")
        return last(velocity, x, DATA_EPS, 0.0) if last else x
    if name not in FIXED_STEP:
        known = [*FIXED_STEP, *ADAPTIVE]
        raise UserError(
            f"sampler.params.sampling_method: {method!r}{nearest(name, known)}", f"one of {', '.join(known)}"
        )
    x, states = noise, [noise]
    for t, t_next in pairwise(times):
        x = (euler if singular_at_data and t_next == 0 else FIXED_STEP[name])(velocity, x, t, t_next)
        if trajectory:
            states.append(x)
    return torch.stack(states) if trajectory else x


def _sample_adaptive(
    velocity: Velocity, x: Tensor, method: str, ends: tuple[float, float], atol: float, rtol: float, *, overshoot: bool
) -> Tensor:
    """torchdiffeq's solver between two times; `overshoot`: step past the end and interpolate back, as the reference.

    Overshooting asks the model for times as low as -0.7 and costs bosh3 0.3 % accuracy.
    """
    from torchdiffeq import odeint

    times = torch.tensor(ends, dtype=torch.float64, device=x.device)
    options = {} if overshoot else {"step_t": times[1:]}
    states = odeint(lambda t, x: velocity(x, float(t)), x, times, method=method, atol=atol, rtol=rtol, options=options)
    return states[-1]


def sample(
    sampler: SamplerSection,
    transport: Transport,
    prediction: Velocity,
    noise: Tensor,
    noise_function: NoiseFunction | None = None,
) -> Tensor:
    """Integrate as the config's `sampler` section says.

    Args:
        sampler: mode ODE or SDE with its parameters.
        transport: path, prediction and shift.
        prediction: (x, t) -> the model's output, guidance included.
        noise: float32 [B, C, H, W].
        noise_function: step -> standard normal like `noise`; needed by mode SDE.

    Raises:
        UserError: unknown mode or parameter values.
    """
    params, mode = sampler.params, sampler.mode.upper()
    if mode not in ("ODE", "SDE"):
        raise UserError(f"sampler.mode: {sampler.mode!r}", "ODE or SDE")
    if mode == "SDE":
        if noise_function is None:
            raise UserError("sampler.mode: SDE without a source of noise", "a noise function")
        return sample_sde(
            transport,
            prediction,
            noise,
            noise_function,
            method=params.sampling_method,
            num_steps=params.num_steps,
            grid=params.grid,
            diffusion_form=params.diffusion_form,
            diffusion_norm=params.diffusion_norm,
            last_step=params.last_step,
            last_step_size=params.last_step_size,
        )

    def velocity(x: Tensor, t: float | Tensor) -> Tensor:
        if isinstance(t, Tensor):
            return transport.velocity(prediction(x, t.float()), x, t.to(x.dtype))
        return transport.velocity(prediction(x, t), x, scalar(t))

    return sample_ode(
        velocity,
        noise,
        method=params.sampling_method,
        num_steps=params.num_steps,
        grid=params.grid,
        shift=transport.shift,
        interval=transport.sampling_interval(params.grid),
        atol=params.atol,
        rtol=params.rtol,
        reverse=params.reverse,
        singular_at_data=transport.prediction == "data",
        per_sample=True,
    )
