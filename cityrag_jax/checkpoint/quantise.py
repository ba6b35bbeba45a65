"""Kernels as int8 with one float32 scale for each output channel: a quarter of float32.

    w = q * scale,  q in -127 .. 127,  scale = max |w| / 127

over every axis of a kernel but the last, which is the output's in linears and
convolutions alike; a layer of a stack has its own scales. What is no kernel (biases,
norms, modulation) and kernels of fewer than 128 inputs, which read pixels or poses
themselves, are stored as float32: together less than a thousandth of the 14B.

The scale of `x.kernel` lies beside it as `x.kernel.scale`, which is no parameter's name
since a kernel has no parts. What lies there as int8 is quantised; no flag says so.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Float32, Int8

from cityrag_jax.checkpoint.descriptions import Arrays

INT8 = np.dtype("int8")
LARGEST = 127
# The toy's pose convolution, 64 inputs in metres and in direction cosines under one
# scale, would alone give more error at high noise than all its blocks together.
FEWEST_INPUTS = 128
KERNEL, SCALE = ".kernel", ".scale"


def scale_of(name: str) -> str:
    """Name the array that holds the scales of a kernel."""
    return name + SCALE


def parameter_of(name: str) -> str:
    """Name the parameter that a stored array, perhaps its scales, belongs to."""
    return name.removesuffix(SCALE) if name.endswith(KERNEL + SCALE) else name


def read_dtype(stored: np.dtype) -> np.dtype:
    """Give the type of a stored array once it is read: that of int8 is float32."""
    return np.dtype(np.float32) if stored == INT8 else stored


def stored_types(arrays: Arrays) -> Arrays:
    """Give abstract arrays the types that `quantise` stores them in."""
    return {
        name: jax.ShapeDtypeStruct(
            x.shape,
            INT8 if _is_quantised(name, x) else np.float32,
            sharding=x.sharding,
        )
        for name, x in arrays.items()
    }


def with_scales(wanted: Arrays, stored: Mapping[str, Any]) -> Arrays:
    """Add the scales of those arrays that are stored as int8, on their shards."""
    found = {}
    for name, x in wanted.items():
        found[name] = x
        if name in stored and stored[name].dtype == INT8:
            found[scale_of(name)] = jax.ShapeDtypeStruct(
                x.shape[-1:], np.float32, sharding=_last_axis(x.shape, x.sharding)
            )
    return found


@jax.jit
def quantise(arrays: Arrays) -> Arrays:
    """Give what is stored of arrays: int8 kernels, their scales, and float32."""
    stored = {}
    for name, x in arrays.items():
        if _is_quantised(name, x):
            stored[name], stored[scale_of(name)] = to_int8(x)
        else:
            stored[name] = x.astype(jnp.float32)
    return stored


def dequantise(arrays: Arrays, dtypes: Mapping[str, np.dtype]) -> Arrays:
    """Multiply int8 arrays with their scales, on their devices; leave all others."""
    pairs = {
        name: (x, arrays[scale_of(name)])
        for name, x in arrays.items()
        if x.dtype == INT8
    }
    others = {name: x for name, x in arrays.items() if parameter_of(name) not in pairs}
    return others | _from_int8(pairs, tuple(dtypes[name] for name in pairs))


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


@functools.partial(jax.jit, static_argnums=1)
def _from_int8(pairs, dtypes):
    return {
        name: from_int8(*pair).astype(dtype)
        for (name, pair), dtype in zip(pairs.items(), dtypes, strict=True)
    }


def _is_quantised(name, x) -> bool:
    return name.endswith(KERNEL) and math.prod(x.shape[:-1]) >= FEWEST_INPUTS


def _along_last_axis(scale, ndim):
    return scale.reshape((1,) * (ndim - 1) + scale.shape)


def _last_axis(shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(spec[-1]))
