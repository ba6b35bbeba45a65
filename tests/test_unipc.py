"""The solver against the official one's trajectories, diffusers, and exact solutions.

Golden tolerances: sigmas 2e-7 (one float32 rounding), timesteps exact, trajectories
5e-6 (the official code makes its coefficients in float32, we in float64).
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from cityrag_jax.diffusion import unipc

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden/unipc.npz")
SCHEDULES = sorted(
    key.removesuffix("_sigmas") for key in GOLDEN if key.endswith("_sigmas")
)
TRAJECTORIES = sorted(
    key.removeprefix("traj").removesuffix("_f32_x")
    for key in GOLDEN
    if key.endswith("_f32_x")
)


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def numbers(name):
    """'40_shift3' names 40 steps and shift 3."""
    steps, shift = name.removeprefix("s").split("_shift")
    return int(steps), float(shift)


def toy_velocity(x, timestep):
    """The golden's velocity field: tanh of a linear map plus a wave in time."""
    matrix, wave = (jnp.asarray(GOLDEN[key].astype(np.float32)) for key in "Ab")
    flat = x.reshape(x.shape[0], -1)
    mixed = jnp.tanh(jnp.einsum("ij,Bj->Bi", matrix, flat))
    return (mixed + (wave * jnp.sin(0.01 * timestep))[None]).reshape(x.shape)


def recorded(velocity_fn, noise, steps):
    """Solve, keeping each state and velocity that the network sees."""
    n = len(steps.timestep)
    blank = jnp.zeros((n, *noise.shape))

    def record(x, timestep, i, seen):
        velocity = velocity_fn(x, timestep)
        states, velocities = seen
        return velocity, (states.at[i].set(x), velocities.at[i].set(velocity))

    indices = jnp.arange(n)
    data, (states, velocities) = unipc.solve_with(
        record, noise, steps, indices, (blank, blank)
    )
    return jnp.concatenate([states, data[None]]), velocities


def test_golden_names_were_found():
    assert len(SCHEDULES) == 10 and len(TRAJECTORIES) == 6


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_official_one(name):
    sigmas, timesteps = unipc.schedule(*numbers(name))
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, GOLDEN[f"{name}_sigmas"], rtol=0, atol=2e-7)
    np.testing.assert_array_equal(timesteps, GOLDEN[f"{name}_timesteps"])


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory_is_the_official_one(name, precision):
    """Every state and velocity, with the whole solve jitted."""
    noise = jnp.asarray(GOLDEN["x_init"].astype(np.float32))
    steps = unipc.make_steps(*numbers(name))
    run = jax.jit(functools.partial(recorded, toy_velocity))
    states, velocities = run(noise, steps)
    golden = {key: GOLDEN[f"traj{name}_{precision}_{key}"] for key in "xv"}
    np.testing.assert_allclose(states, golden["x"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(velocities, golden["v"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_jitted_solve_ends_where_the_official_one_does(name):
    noise = jnp.asarray(GOLDEN["x_init"].astype(np.float32))
    num_steps, shift = numbers(name)
    solve = jax.jit(lambda noise: unipc.solve(toy_velocity, noise, num_steps, shift))
    expected = GOLDEN[f"traj{name}_f64_x"][-1]
    np.testing.assert_allclose(solve(noise), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("num_steps, shift", [(1, 3.0), (5, 1), (20, 3.0), (40, 5.0)])
def test_solver_equals_diffusers_on_the_official_levels(num_steps, shift):
    """diffusers spaces its levels differently, but takes ours; the steps agree.

    Both hold float32 states; diffusers' coefficients are float32 too, hence 5e-6.
    """
    levels = np.linspace(unipc.FIRST_LEVEL, 0.0, num_steps + 1)[:-1]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(sigmas=levels, device="cpu")
    sigmas, timesteps = unipc.schedule(num_steps, shift)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), timesteps)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), sigmas, rtol=0, atol=2e-7)

    noise = jnp.asarray(GOLDEN["x_init"].astype(np.float32))
    x = torch.from_numpy(np.array(noise))
    for time in scheduler.timesteps:
        velocity = np.array(toy_velocity(jnp.asarray(x.numpy()), jnp.float32(time)))
        x = scheduler.step(torch.from_numpy(velocity), time, x).prev_sample
    ours = unipc.solve(toy_velocity, noise, num_steps, shift)
    np.testing.assert_allclose(ours, x.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 40])
def test_a_constant_data_prediction_is_reached_exactly(num_steps, rng):
    """If the velocity always points from one clip, every order returns that clip.

    The first level is 0.999, not 1, and noise enters at it; the division by sigma
    amplifies roundings at the last levels, hence 1e-5.
    """
    clip = jnp.asarray(rng.standard_normal((1, 2, 3)).astype(np.float32))
    noise = jnp.asarray(rng.standard_normal((1, 2, 3)).astype(np.float32))
    steps = unipc.make_steps(num_steps, 3.0)

    def velocity(x, timestep, sigma, state):
        return (x - clip) / sigma, state

    found, _ = unipc.solve_with(velocity, noise, steps, jnp.asarray(steps.sigma))
    np.testing.assert_allclose(found, clip, atol=1e-5)


def test_error_falls_with_the_square_of_the_steps():
    """Order 2: twice the steps, a quarter of the error, on gaussian data.

    For data of standard deviation d the velocity is known in closed form and the state
    keeps its direction: x_sigma = x_1 * sqrt((1 - sigma)^2 d^2 + sigma^2).
    """
    spread, start = 0.5, jnp.ones((1, 1))

    def velocity(x, timestep, sigma, state):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        return x * (sigma - (1 - sigma) * spread**2) / variance, state

    def error(num_steps):
        steps = unipc.make_steps(num_steps, 1.0)
        sigma = steps.sigma[0].astype(np.float64)
        exact = spread / np.sqrt((1 - sigma) ** 2 * spread**2 + sigma**2)
        levels = jnp.asarray(steps.sigma)
        found, _ = unipc.solve_with(velocity, start, steps, levels)
        return abs(float(found[0, 0]) - exact)

    assert error(80) < error(40) / 3 < error(20) / 9


def test_every_combination_keeps_a_point_that_noise_and_data_share():
    """With noise = data = x a state stays x: weights of a line through it sum to 1."""
    steps = unipc.make_steps(40, 3.0)
    np.testing.assert_allclose(steps.corrector.sum(1), 1, atol=2e-7)
    np.testing.assert_allclose(steps.predictor.sum(1), 1, atol=2e-7)


def test_another_schedule_or_skip_mask_does_not_compile_again():
    """The step cache chooses skipped steps on the host and hands them in."""
    compiled = 0

    @jax.jit
    def sample(noise, steps, skip):
        nonlocal compiled
        compiled += 1

        def cached(x, timestep, skip_now, last):
            velocity = jax.lax.cond(
                skip_now, lambda: last, lambda: toy_velocity(x, timestep)
            )
            return velocity, velocity

        start = jnp.zeros_like(noise)
        return unipc.solve_with(cached, noise, steps, skip, start)[0]

    noise = jnp.asarray(GOLDEN["x_init"].astype(np.float32))
    never = jnp.zeros(10, bool)
    plain = sample(noise, unipc.make_steps(10, 3.0), never)
    expected = unipc.solve(toy_velocity, noise, 10, 3.0)
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-6)
    skipping = sample(noise, unipc.make_steps(10, 3.0), never.at[5].set(True))
    sample(noise, unipc.make_steps(10, 5.0), never)
    assert compiled == 1
    assert 1e-5 < jnp.abs(skipping - plain).max() < 1


def test_bfloat16_velocities_are_integrated_in_float32():
    noise = jnp.asarray(GOLDEN["x_init"].astype(np.float32))

    def rounded(x, timestep):
        assert x.dtype == jnp.float32 and timestep.shape == ()
        return toy_velocity(x, timestep).astype(jnp.bfloat16)

    assert unipc.solve(rounded, noise, 4, 3.0).dtype == jnp.float32


@pytest.mark.parametrize("arguments", [(0, 3.0), (10, 0.0), (10, -1.0)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="give 1 or more|not positive"):
        unipc.schedule(*arguments)


def test_sigmas_that_do_not_fall_to_0_are_refused():
    timesteps = np.array([900.0, 500.0], np.float32)
    for sigmas in ([1.0, 0.5, 0.0], [0.9, 0.5, 0.1], [0.5, 0.9, 0.0]):
        with pytest.raises(ValueError, match="fall strictly to 0"):
            unipc.steps_from_sigmas(np.array(sigmas, np.float32), timesteps)
    with pytest.raises(ValueError, match="2 sigmas for 2 timesteps"):
        unipc.steps_from_sigmas(np.array([0.9, 0.0], np.float32), timesteps)
