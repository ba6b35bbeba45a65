"""UniPC, the solver of Wan 2.1: order 2, "bh2", data prediction, always corrected.

A step is one velocity at the predicted state x, then two linear combinations:

    m_i     = x_i - sigma_i v_i                                   data prediction
    X_i     = a0 X_{i-1} + a1 m_{i-2} + a2 m_{i-1} + a3 m_i       corrector
    x_{i+1} = b0 X_i     + b1 m_{i-1} + b2 m_i                    predictor

whose coefficients depend on the schedule alone. They are made on the host in float64;
the states are float32. The network is not asked again after the correction.

Source: UniPC (arXiv:2302.04867) as Wan-Video/Wan2.1 `fm_solvers_unipc.py` sets it up:
noise levels start at 0.999 and whole timesteps are handed to the network. The schedule
of diffusers 0.42.1 differs (it spaces from 1 to 0.001), its steps do not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree

from cityrag_jax.diffusion.flow import NUM_TIMESTEPS

# The official schedule starts at alpha's last entry, which is stored in float32.
FIRST_LEVEL = float(np.float32(0.999))

VelocityFn = Callable[[Array, Array], Array]
StatefulVelocityFn = Callable[[Array, Array, PyTree, PyTree], tuple[Array, PyTree]]


class Steps(NamedTuple):
    """All that the steps of a schedule need; the leading axis n is the step.

    `timestep` is whole-numbered float32, as the network takes it; `corrector` holds
    a0 to a3 and `predictor` b0 to b2 of the module's equations.
    """

    timestep: Float32[np.ndarray | Array, " n"]
    sigma: Float32[np.ndarray | Array, " n"]
    corrector: Float32[np.ndarray | Array, "n 4"]
    predictor: Float32[np.ndarray | Array, "n 3"]


class _Carry(NamedTuple):
    x: Array
    corrected: Array
    data_before: Array
    data_last: Array
    state: PyTree


def schedule(
    num_steps: int, shift: float | int
) -> tuple[Float32[np.ndarray, " n_and_1"], Float32[np.ndarray, " n"]]:
    """Give the official sigmas [n + 1], which end in 0, and timesteps [n].

    Timesteps are floor(1000 sigma), whole numbers in float32; the solver goes on
    with the unrounded sigmas. Raises ValueError for no steps or a shift below or at 0.
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps} solver steps make no video; give 1 or more.")
    if shift <= 0:
        raise ValueError(
            f"Shift {shift} is not positive; 1 leaves the schedule as it is, "
            "Wan uses 3 at 480p and 5 at 720p."
        )
    level = np.linspace(FIRST_LEVEL, 0.0, num_steps + 1)[:-1]
    sigma = shift * level / (1 + (shift - 1) * level)
    timesteps = np.floor(NUM_TIMESTEPS * sigma).astype(np.float32)
    return np.append(sigma, 0.0).astype(np.float32), timesteps


def make_steps(num_steps: int, shift: float | int) -> Steps:
    """Prepare the steps of the official schedule, on the host."""
    return steps_from_sigmas(*schedule(num_steps, shift))


def steps_from_sigmas(
    sigmas: Float32[np.ndarray, " n_and_1"], timesteps: Float32[np.ndarray, " n"]
) -> Steps:
    """Prepare the steps of any schedule of falling sigmas below 1 that ends in 0."""
    if len(sigmas) != len(timesteps) + 1:
        raise ValueError(
            f"{len(sigmas)} sigmas for {len(timesteps)} timesteps; "
            "give one sigma more, the last being 0."
        )
    if sigmas[0] >= 1 or sigmas[-1] != 0 or np.any(np.diff(sigmas) >= 0):
        raise ValueError(
            f"Sigmas from {sigmas[0]} to {sigmas[-1]} must start below 1 and fall "
            "strictly to 0; schedule(num_steps, shift) makes such."
        )
    exact = sigmas.astype(np.float64)
    num_steps = len(timesteps)
    corrector = [_corrector(exact, i) for i in range(num_steps)]
    predictor = [_predictor(exact, i) for i in range(num_steps)]
    return Steps(
        timestep=timesteps.astype(np.float32),
        sigma=sigmas[:-1].astype(np.float32),
        corrector=np.asarray(corrector, np.float32),
        predictor=np.asarray(predictor, np.float32),
    )


def solve(
    velocity_fn: VelocityFn,
    noise: Float[Array, "*shape"],
    num_steps: int,
    shift: float | int,
) -> Float32[Array, "*shape"]:
    """Integrate noise to data by the official schedule, in one scan.

    `velocity_fn(x, timestep)` gets the float32 state and a 0-d float32 timestep.
    """

    def stateless(x, timestep, step_input, state):
        return velocity_fn(x, timestep), state

    data, _ = solve_with(stateless, noise, make_steps(num_steps, shift))
    return data


def solve_with(
    velocity_fn: StatefulVelocityFn,
    noise: Float[Array, "*shape"],
    steps: Steps,
    step_inputs: PyTree = None,
    state: PyTree = None,
) -> tuple[Float32[Array, "*shape"], PyTree]:
    """Integrate noise to data with inputs and a memory of the velocity's own.

    `velocity_fn(x, timestep, step_input, state) -> (velocity, state)` gets at step i
    the i-th slice of `step_inputs`, arrays with a leading axis of n steps (a step
    cache's skip mask, the step's number), and the state it returned the step before
    (the cached residual). `steps` and `step_inputs` may be arguments of a jitted
    function: another schedule of the same length does not compile again.
    Returns the data and the last state.
    """
    start = noise.astype(jnp.float32)
    zero = jnp.zeros_like(start)

    def step(carry: _Carry, now: tuple[Steps, PyTree]) -> tuple[_Carry, None]:
        at, step_input = now
        velocity, new_state = velocity_fn(carry.x, at.timestep, step_input, carry.state)
        data = carry.x - at.sigma * velocity.astype(jnp.float32)
        a, b = at.corrector, at.predictor
        corrected = (
            a[0] * carry.corrected
            + a[1] * carry.data_before
            + a[2] * carry.data_last
            + a[3] * data
        )
        x = b[0] * corrected + b[1] * carry.data_last + b[2] * data
        return _Carry(x, corrected, carry.data_last, data, new_state), None

    xs: Any = (jax.tree.map(jnp.asarray, steps), step_inputs)
    last, _ = jax.lax.scan(step, _Carry(start, start, zero, zero, state), xs)
    return last.x, last.state


def _log_snr(sigma: float) -> float:
    return np.log1p(-sigma) - np.log(sigma)


def _predictor_order(num_steps: int, i: int) -> int:
    return min(2, num_steps - i, i + 1)


def _corrector(sigmas: np.ndarray, i: int) -> tuple[float, float, float, float]:
    """Weights of X_{i-1}, m_{i-2}, m_{i-1}, m_i. Step 0 keeps the noise."""
    if i == 0:
        return 1.0, 0.0, 0.0, 0.0
    now, last = sigmas[i], sigmas[i - 1]
    h = _log_snr(now) - _log_snr(last)
    decay = np.expm1(-h)
    scale = -(1 - now) * decay
    if _predictor_order(len(sigmas) - 1, i - 1) == 1:
        return now / last, 0.0, scale / 2, scale / 2
    r = (_log_snr(sigmas[i - 2]) - _log_snr(last)) / h
    c = -decay / h - 1
    target = np.array([c / decay, 2 * (-c / h - 0.5) / decay])
    k1, k2 = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), target)
    return now / last, scale * k1 / r, scale * (1 - k1 / r - k2), scale * k2


def _predictor(sigmas: np.ndarray, i: int) -> tuple[float, float, float]:
    """Weights of X_i, m_{i-1}, m_i. The last step returns the data prediction."""
    num_steps = len(sigmas) - 1
    if i == num_steps - 1:
        return 0.0, 0.0, 1.0
    now, following = sigmas[i], sigmas[i + 1]
    h = _log_snr(following) - _log_snr(now)
    scale = -(1 - following) * np.expm1(-h)
    if _predictor_order(num_steps, i) == 1:
        return following / now, 0.0, scale
    half = scale / (2 * (_log_snr(sigmas[i - 1]) - _log_snr(now)) / h)
    return following / now, half, scale - half
