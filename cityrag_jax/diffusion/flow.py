"""Rectified flow: noise levels, the straight line from data to noise, the loss.

The noise level sigma runs from 0 (data) to 1 (noise):

    x_sigma = (1 - sigma) data + sigma noise        velocity = noise - data

and the network is told the timestep 1000 sigma. This is Wan 2.1's own objective; some
flow-matching code has velocity with the other sign. Everything here is float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key, UInt

NUM_TIMESTEPS = 1000


def shift_timesteps(u: Float[Array, " B"], shift: float | int) -> Float[Array, " B"]:
    """Move uniform noise levels toward 1, so that large videos see enough noise.

    sigma = shift * u / (1 + (shift - 1) * u). Identity for shift 1; the paper uses 3
    (appendix C).
    """
    return shift * u / (1 + (shift - 1) * u)


def timesteps_of(sigma: Float[Array, " B"]) -> Float32[Array, " B"]:
    """Give the timestep in [0, 1000] that the network is told, not rounded.

    *Assumed* for training; sampling hands over whole timesteps (`unipc.schedule`).
    """
    return NUM_TIMESTEPS * sigma.astype(jnp.float32)


def interpolate(
    data: Float[Array, " B *shape"],
    noise: Float[Array, " B *shape"],
    sigma: Float[Array, " B"],
) -> Float32[Array, " B *shape"]:
    """Mix data with noise at one noise level for each clip."""
    sigma = _per_clip(sigma, data)
    return (1 - sigma) * _float32(data) + sigma * _float32(noise)


def velocity_target(
    data: Float[Array, "*shape"], noise: Float[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Give the velocity that the network should predict: noise minus data."""
    return _float32(noise) - _float32(data)


def data_prediction(
    x: Float[Array, " B *shape"],
    velocity: Float[Array, " B *shape"],
    sigma: Float[Array, " B"],
) -> Float32[Array, " B *shape"]:
    """Read the clean data off a noisy state and its velocity: x - sigma velocity."""
    return _float32(x) - _per_clip(sigma, x) * _float32(velocity)


def loss(
    velocity: Float[Array, " B *shape"],
    noise: Float[Array, " B *shape"],
    data: Float[Array, " B *shape"],
) -> tuple[Float32[Array, ""], Float32[Array, " B"]]:
    """Measure predicted velocities: the mean over clips, and the error of each clip.

    Mean squared error in float32 whatever the type of the prediction. Every noise level
    and every clip counts the same (*assumed*), so that a clip's gradient does not
    depend on what else is in the batch.
    """
    error = _float32(velocity) - velocity_target(data, noise)
    per_clip = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return jnp.mean(per_clip), per_clip


def clip_keys(key: Key[Array, ""], clip_id: UInt[Array, " B"]) -> Key[Array, " B"]:
    """Derive a key for each clip, the same wherever in whichever batch it stands."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, clip_id)


def draw_noise_levels(
    keys: Key[Array, " B"], shift: float | int
) -> Float32[Array, " B"]:
    """Draw a noise level in [0, 1) for each clip: uniform, then shifted."""
    return shift_timesteps(jax.vmap(jax.random.uniform)(keys), shift)


def draw_noise(
    keys: Key[Array, " B"], shape: tuple[int, ...]
) -> Float32[Array, "B ..."]:
    """Draw standard normal noise [B, *shape] in float32 from a key for each clip.

    For the noise level and the noise of one clip use different keys, such as the two
    of `jax.random.split`.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def draw(
    key: Key[Array, ""],
    clip_id: UInt[Array, " B"],
    shape: tuple[int, ...],
    shift: float | int,
) -> tuple[Float32[Array, " B"], Float32[Array, "B ..."]]:
    """Draw what a training step needs: noise levels [B] and noise [B, *shape].

    Fold the step into `key` first. The draw of a clip depends on `key` and its id
    alone, so that every mesh and every order of the batch sees the same noise.
    """
    level_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(
        clip_keys(key, clip_id)
    )
    return draw_noise_levels(level_keys, shift), draw_noise(noise_keys, shape)


def _float32(x: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return x.astype(jnp.float32)


def _per_clip(
    sigma: Float[Array, " B"], like: Float[Array, " B *shape"]
) -> Float32[Array, "B ..."]:
    return _float32(sigma).reshape(-1, *(1,) * (like.ndim - 1))
