"""Noise levels, the straight line between data and noise, and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cityrag_jax.diffusion import flow


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def pair(rng):
    data, noise = rng.standard_normal((2, 3, 2, 4, 5, 16)).astype(np.float32)
    return jnp.asarray(data), jnp.asarray(noise)


@pytest.mark.parametrize("shift", [1.0, 3, 5.0])
def test_shifting_keeps_the_ends_and_moves_the_median(shift):
    u = jnp.array([0.0, 0.5, 1.0])
    expected = [0, shift / (1 + shift), 1]
    np.testing.assert_allclose(flow.shift_timesteps(u, shift), expected, atol=1e-7)


def test_shift_of_1_is_the_identity():
    u = jnp.linspace(0, 1, 11)
    np.testing.assert_array_equal(flow.shift_timesteps(u, 1.0), u)


def test_shifts_compose_by_product(rng):
    """Shifting scales the odds u / (1 - u), so 2 after 3 is 6."""
    u = jnp.asarray(rng.uniform(size=50).astype(np.float32))
    twice = flow.shift_timesteps(flow.shift_timesteps(u, 3.0), 2.0)
    np.testing.assert_allclose(twice, flow.shift_timesteps(u, 6.0), atol=3e-7)


def test_line_runs_from_data_to_noise(pair):
    data, noise = pair
    np.testing.assert_array_equal(flow.interpolate(data, noise, jnp.zeros(3)), data)
    np.testing.assert_array_equal(flow.interpolate(data, noise, jnp.ones(3)), noise)


def test_velocity_is_the_derivative_of_the_line(pair):
    """The line is straight, so a difference quotient is exact up to rounding."""
    data, noise = pair
    low, high = jnp.full(3, 0.25), jnp.full(3, 0.75)
    slope = flow.interpolate(data, noise, high) - flow.interpolate(data, noise, low)
    expected = flow.velocity_target(data, noise)
    np.testing.assert_allclose(2 * slope, expected, atol=2e-6)


def test_data_is_read_off_state_and_velocity(pair):
    data, noise = pair
    sigma = jnp.array([0.1, 0.5, 0.999])
    x = flow.interpolate(data, noise, sigma)
    found = flow.data_prediction(x, flow.velocity_target(data, noise), sigma)
    np.testing.assert_allclose(found, data, atol=2e-6)


def test_noise_levels_are_one_for_each_clip(pair):
    data, noise = pair
    sigma = jnp.array([0.2, 0.6, 0.9])
    together = flow.interpolate(data, noise, sigma)
    for i in range(3):
        alone = flow.interpolate(data[i : i + 1], noise[i : i + 1], sigma[i : i + 1])
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_perfect_velocity_has_no_loss(pair):
    data, noise = pair
    mean, per_clip = flow.loss(flow.velocity_target(data, noise), noise, data)
    assert mean == 0 and np.all(per_clip == 0)


def test_loss_is_the_mean_squared_error(pair, rng):
    data, noise = pair
    velocity = jnp.asarray(rng.standard_normal(data.shape).astype(np.float32))
    mean, per_clip = flow.loss(velocity, noise, data)
    error = np.float64(velocity) - (np.float64(noise) - np.float64(data))
    np.testing.assert_allclose(per_clip, np.mean(error**2, (1, 2, 3, 4)), rtol=1e-6)
    np.testing.assert_allclose(mean, np.mean(error**2), rtol=1e-6)


def test_loss_of_a_clip_does_not_depend_on_its_batch(pair):
    data, noise = pair
    velocity = jnp.zeros_like(data)
    _, together = flow.loss(velocity, noise, data)
    _, alone = flow.loss(velocity[1:2], noise[1:2], data[1:2])
    assert together[1] == alone[0]


def test_loss_of_bfloat16_predictions_is_computed_in_float32(pair):
    """In bfloat16 the sum of squares would be off by about 1e-2."""
    data, noise = pair
    velocity = (0.5 * data).astype(jnp.bfloat16)
    mean, _ = flow.loss(velocity, noise, data)
    exact, _ = flow.loss(velocity.astype(jnp.float32), noise, data)
    assert mean.dtype == jnp.float32 and mean == exact


def test_draws_of_a_clip_do_not_depend_on_its_place_in_the_batch():
    key = jax.random.key(7)
    ids = jnp.array([5, 9, 2**32 - 1], jnp.uint32)
    sigma, noise = flow.draw(key, ids, (2, 4, 4, 16), 3.0)
    sigma_back, noise_back = flow.draw(key, ids[::-1], (2, 4, 4, 16), 3.0)
    np.testing.assert_array_equal(sigma, sigma_back[::-1])
    np.testing.assert_array_equal(noise, noise_back[::-1])
    assert len(set(sigma.tolist())) == 3


def test_draws_follow_the_stated_distributions():
    """Median a / (1 + a) = 0.75 for shift 3; 4096 draws put it within 0.02."""
    ids = jnp.arange(4096, dtype=jnp.uint32)
    sigma, noise = flow.draw(jax.random.key(0), ids, (16,), 3.0)
    assert 0 <= sigma.min() and sigma.max() < 1
    assert abs(np.median(sigma) - 0.75) < 0.02
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(sigma, noise[:, 0])[0, 1]) < 0.06


def test_timesteps_run_from_0_to_1000():
    sigma = jnp.array([0.0, 0.5, 1.0], jnp.bfloat16)
    times = flow.timesteps_of(sigma)
    assert times.dtype == jnp.float32
    np.testing.assert_array_equal(times, [0, 500, 1000])
