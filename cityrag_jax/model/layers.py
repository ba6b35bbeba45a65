"""Linear maps, norms and positions of the transformer.

Linears compute in the config's `dtype`; norm statistics and angles are float32, as the
official inference does (Wan-Video/Wan2.1, wan/modules/model.py). A product of float32
is one: `precision_of` says so to the compiler wherever factors may be float32.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cityrag_jax.int8 import Int8Kernel, Kernel, dense

Init = jax.nn.initializers.Initializer
XAVIER = jax.nn.initializers.xavier_uniform()
ZEROS = jax.nn.initializers.zeros


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Give the precision that makes a product of `dtype` what its type says.

    By default a GPU rounds float32 factors to TF32 and a TPU to bfloat16.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


class Linear(nnx.Module):
    """y = x @ kernel + bias, in `dtype`; `axes` name the kernel's logical axes.

    What an `adapter` (`model.adapters`) makes of x, if there is one, is added.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        init: Init = XAVIER,
        rngs: nnx.Rngs,
    ):
        kernel = init(rngs.params(), (in_features, out_features), param_dtype)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype), axes=(None,))
        self.dtype = dtype
        self.adapter: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = affine(x.astype(self.dtype), self.kernel.get_value(), self.bias[...])
        return y if self.adapter is None else y + self.adapter(x)


@jax.custom_vjp
def affine(
    x: Float[Array, "... I"], kernel: Kernel, bias: Float[Array, " O"]
) -> Float[Array, "... O"]:
    """x @ kernel + bias in the type of `x`, whatever that of the parameters.

    A kernel held as int8 is multiplied out here, forward and again backward: nothing
    else of it is kept in between, and it has no gradient.

    The gradients of kernel and bias leave their sums in float32. By JAX's own rule they
    would have the type of `x`, and devices would add up bfloat16 numbers.
    """
    precision = precision_of(x.dtype)
    y = jnp.einsum("...i,io->...o", x, dense(kernel, x.dtype), precision=precision)
    return y + jnp.expand_dims(bias.astype(x.dtype), tuple(range(y.ndim - 1)))


def _affine_forward(x, kernel, bias):
    return affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(given, by_y):
    x, kernel, bias = given
    precision = precision_of(x.dtype)
    by_x = jnp.einsum(
        "...o,io->...i", by_y, dense(kernel, x.dtype), precision=precision
    )
    rows = tuple(range(x.ndim - 1))
    by_bias = by_y.sum(rows, dtype=jnp.float32).astype(bias.dtype)
    if isinstance(kernel, Int8Kernel):
        return by_x, None, by_bias
    by_kernel = jnp.tensordot(
        x,
        by_y,
        (rows, rows),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return by_x, by_kernel.astype(kernel.dtype), by_bias


affine.defvjp(_affine_forward, _affine_backward)


class MLP(nnx.Module):
    """Two linears with an activation between."""

    def __init__(self, sizes, activation, *, dtype, param_dtype, init=XAVIER, rngs):
        width, hidden, out = sizes
        kinds = dict(dtype=dtype, param_dtype=param_dtype, init=init, rngs=rngs)
        self.fc1 = Linear(width, hidden, axes=("embed", "mlp"), **kinds)
        self.fc2 = Linear(hidden, out, axes=("mlp", "embed"), **kinds)
        self.activation = activation

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return self.fc2(self.activation(self.fc1(x)))


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Approximate GELU, as the feed-forward and the text embedding use it."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by the error function, as the image embedding uses it."""
    return jax.nn.gelu(x, approximate=False)


class RMSNorm(nnx.Module):
    """x / rms(x) over the last axis, float32 statistics, then times `scale`.

    The weight multiplies after the cast back to the input's type. That product of two
    is formed in float32 and rounded, which is the same number; but so the gradient of
    the weight is summed in float32.
    """

    def __init__(self, features: int, eps: float, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(features, param_dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        unit = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        scale = self.scale[...].astype(x.dtype).astype(jnp.float32)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        return (unit.astype(jnp.float32) * scale).astype(x.dtype)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs):
    """Build `count` equal modules as one whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), count)
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def normalise(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Layer norm without parameters, in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias, in float32."""

    def __init__(self, features: int, eps: float, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(features, param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.affine(normalise(x, self.eps))

    def affine(self, unit: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Apply weight and bias to what is normalised already."""
        lead = tuple(range(unit.ndim - 1))
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), lead)
        return unit * scale + jnp.expand_dims(self.bias[...].astype(jnp.float32), lead)


@lru_cache
def _whole_timestep_angles(width: int) -> tuple[np.ndarray, np.ndarray]:
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(1001)[:, None] * frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def timestep_embedding(
    timesteps: Float[Array, " B"], width: int
) -> Float[Array, "B width"]:
    """Embed timesteps in [0, 1000] as all cosines, then all sines.

    The official code evaluates the angles in float64. Here cosines and sines of whole
    timesteps come from the host in float64 and the fraction, whose angle is below 1, is
    added by the addition theorem: the error is 1e-7 without 64-bit types.
    """
    cosines, sines = _whole_timestep_angles(width)
    timesteps = timesteps.astype(jnp.float32)
    whole = jnp.clip(jnp.floor(timesteps), 0, 1000)
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angle = (timesteps - whole)[:, None] * frequencies.astype(np.float32)[None, :]
    index = whole.astype(jnp.int32)
    c, s = jnp.asarray(cosines)[index], jnp.asarray(sines)[index]
    dc, ds = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([c * dc - s * ds, s * dc + c * ds], axis=-1)


def rotary_angles(grid: tuple[int, int, int], head_dim: int) -> Float[Array, "L R 2"]:
    """Give cosine and sine for every token of a (t, h, w) grid, t slowest.

    Of a head's pairs, h and w get head_dim // 6 each and t the rest (22, 21, 21 of
    128 / 2); every axis has its own ladder of frequencies.
    """
    small = head_dim // 6
    pairs = (head_dim // 2 - 2 * small, small, small)
    tables = []
    for axis, (length, n) in enumerate(zip(grid, pairs, strict=True)):
        angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(n) / n)[None, :]
        table = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
        shape = [1, 1, 1, n, 2]
        shape[axis] = length
        tables.append(jnp.broadcast_to(table.reshape(shape), (*grid, n, 2)))
    return rearrange(jnp.concatenate(tables, axis=3), "t h w k c -> (t h w) k c")


def rotate(
    x: Float[Array, "B L N K"], angles: Float[Array, "L R 2"]
) -> Float[Array, "B L N K"]:
    """Turn the interleaved pairs (2i, 2i + 1) of every head by the tokens' angles."""
    pairs = rearrange(x.astype(jnp.float32), "B L N (k c) -> B L N k c", c=2)
    cosine = angles[None, :, None, :, 0]
    sine = angles[None, :, None, :, 1]
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack(
        [real * cosine - imaginary * sine, real * sine + imaginary * cosine], axis=-1
    )
    return rearrange(turned, "B L N k c -> B L N (k c)").astype(x.dtype)
