"""Kernels as int8 with one float32 scale for each output channel.

    w = q * scale,  q in -127 .. 127,  scale = max |w| / 127

over every axis of a kernel but the last, which is the output's in linears and
convolutions alike. Among named arrays the scale of `x.kernel` stands beside it as
`x.kernel.scale`, which is no parameter's name since a kernel has no parts.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8

LARGEST = 127
KERNEL, SCALE = ".kernel", ".scale"


class Int8Kernel(NamedTuple):
    """A linear's kernel, or a stack of them, held in a quarter of float32.

    Nothing is derived by it: it belongs to a parameter that is frozen, or only used.
    """

    q: Int8[Array, "*layers in out"]
    scale: Float32[Array, "*layers out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.q.shape

    def dense(self, dtype: DTypeLike) -> Float[Array, "*layers in out"]:
        """Give the kernel itself: multiplied in float32, then rounded to `dtype`."""
        return (self.q.astype(jnp.float32) * self.scale[..., None, :]).astype(dtype)


Kernel = Float[Array, "..."] | Int8Kernel


def dense(kernel: Kernel, dtype: DTypeLike) -> Float[Array, "..."]:
    """Give a kernel in `dtype`, however it is held."""
    if isinstance(kernel, Int8Kernel):
        return kernel.dense(dtype)
    return kernel.astype(dtype)


def scale_of(name: str) -> str:
    """Name the array that holds the scales of a kernel."""
    return name + SCALE


def parameter_of(name: str) -> str:
    """Name the parameter that an array, perhaps its scales, belongs to."""
    return name.removesuffix(SCALE) if name.endswith(KERNEL + SCALE) else name


def is_scale(name: str) -> bool:
    """Say whether an array is the scales of a kernel."""
    return parameter_of(name) != name


def to_int8(
    w: Float[Array, "*in out"],
) -> tuple[Int8[Array, "*in out"], Float32[Array, " out"]]:
    """Round to the nearest step, halves to even; a channel of zeros stays zeros.

    One with NaN or Inf gets the scale NaN.
    """
    w = w.astype(jnp.float32)
    others = tuple(range(w.ndim - 1))
    scale = jnp.max(jnp.abs(w), axis=others) / LARGEST
    # Said by hand: the maximum that XLA takes on CPUs passes over NaN.
    scale = jnp.where(jnp.isfinite(w).all(axis=others), scale, jnp.nan)
    steps = w / _along_last_axis(jnp.where(scale == 0, 1, scale), w.ndim)
    return jnp.round(steps).astype(jnp.int8), scale


def from_int8(
    q: Int8[Array, "*in out"], scale: Float32[Array, " out"]
) -> Float32[Array, "*in out"]:
    """Undo `to_int8`, within half a step."""
    return q.astype(jnp.float32) * _along_last_axis(scale, q.ndim)


def _along_last_axis(scale, ndim):
    return scale.reshape((1,) * (ndim - 1) + scale.shape)
