"""Which arrays of a model are int8 (`cityrag_jax.int8`), on disk and in memory.

On disk a layer of a stack has its own scales. What is no kernel (biases, norms,
modulation) and kernels of fewer than 128 inputs, which read pixels or poses themselves,
are stored as float32: together less than a thousandth of the 14B. What lies there as
int8 is quantised; no flag says so.

In memory the kernels of stacked linears may stay int8 (`held_in_int8`), where names ask
for it; each layer is multiplied out as it runs. They are 97 % of the 14B.
"""

import fnmatch
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from cityrag_jax.checkpoint.descriptions import Arrays
from cityrag_jax.int8 import (
    KERNEL,
    from_int8,
    is_scale,
    parameter_of,
    scale_of,
    to_int8,
)

INT8 = np.dtype("int8")
# The toy's pose convolution, 64 inputs in metres and in direction cosines under one
# scale, would alone give more error at high noise than all its blocks together.
FEWEST_INPUTS = 128


def read_dtype(stored: np.dtype) -> np.dtype:
    """Give the type of a stored array once it is read: that of int8 is float32."""
    return np.dtype(np.float32) if stored == INT8 else stored


def stored_types(arrays: Arrays) -> Arrays:
    """Give abstract arrays the types that `quantise` stores them in."""
    return {
        name: jax.ShapeDtypeStruct(
            x.shape,
            INT8 if _is_quantised(name, x.shape) else np.float32,
            sharding=x.sharding,
        )
        for name, x in arrays.items()
    }


def with_scales(wanted: Arrays, stored: Mapping[str, Any]) -> Arrays:
    """Give what lies on disk of wanted arrays: scales beside those that are int8 there.

    They lie on the shards of their kernels' outputs.
    """
    found = {}
    for name, x in wanted.items():
        if is_scale(name):
            continue
        found[name] = x
        if name in stored and stored[name].dtype == INT8:
            found[scale_of(name)] = _abstract_scale(x)
    return found


def held_in_int8(
    wanted: Arrays, stacked: Collection[str], patterns: Collection[str]
) -> Arrays:
    """Give abstract arrays with int8 and scales for stacked kernels of those names."""
    found = {}
    for name, x in wanted.items():
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        matrix = name in stacked and len(x.shape) == 3
        if named and matrix and _is_quantised(name, x.shape[1:]):
            found[name] = jax.ShapeDtypeStruct(x.shape, INT8, sharding=x.sharding)
            found[scale_of(name)] = _abstract_scale(x, layers=1)
        else:
            found[name] = x
    return found


def hold(values: Arrays, wanted: Arrays) -> Arrays:
    """Bring values, taken over, to the types and shards of abstract arrays.

    One after another, so that no second copy of them all is needed.
    """
    held = {}
    for name in list(values):
        x, target = values.pop(name), wanted[name]
        if target.dtype == INT8 and x.dtype != INT8:
            shards = target.sharding, wanted[scale_of(name)].sharding
            held[name], held[scale_of(name)] = _quantise_stack(shards)(x)
            jax.block_until_ready(held[name])
        else:
            held[name] = jax.device_put(x.astype(target.dtype), target.sharding)
    return held


@jax.jit
def quantise(arrays: Arrays) -> Arrays:
    """Give what is stored of arrays: int8 kernels, their scales, and float32."""
    stored = {}
    for name, x in arrays.items():
        if x.dtype == INT8:
            stored[name] = x
        elif _is_quantised(name, x.shape):
            stored[name], stored[scale_of(name)] = to_int8(x)
        else:
            stored[name] = x.astype(jnp.float32)
    return stored


def dequantise(arrays: Arrays, dtypes: Mapping[str, np.dtype]) -> Arrays:
    """Multiply int8 arrays with their scales, on their devices; leave all others.

    Those that `dtypes` wants as int8 are left, too, or made so.
    """
    pairs = {
        name: (x, arrays[scale_of(name)])
        for name, x in arrays.items()
        if x.dtype == INT8 and dtypes[name] != INT8
    }
    others = {name: x for name, x in arrays.items() if parameter_of(name) not in pairs}
    coarse = {
        name: others.pop(name)
        for name, x in arrays.items()
        if dtypes.get(name) == INT8 and x.dtype != INT8
    }
    made = _from_int8(pairs, tuple(dtypes[name] for name in pairs))
    return others | made | (quantise(coarse) if coarse else {})


@functools.partial(jax.jit, static_argnums=1)
def _from_int8(pairs, dtypes):
    return {
        name: from_int8(*pair).astype(dtype)
        for (name, pair), dtype in zip(pairs.items(), dtypes, strict=True)
    }


@functools.cache
def _quantise_stack(shards):
    return jax.jit(lambda x: jax.lax.map(to_int8, x), out_shardings=shards)


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(KERNEL) and math.prod(shape[:-1]) >= FEWEST_INPUTS


def _abstract_scale(kernel, layers: int = 0):
    """Give the scales of an abstract kernel, of each of a stack with `layers` 1."""
    shape = (*kernel.shape[:layers], kernel.shape[-1])
    sharding = _of_outputs(kernel.shape, kernel.sharding, layers)
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)


def _of_outputs(shape: tuple[int, ...], sharding: Sharding, layers: int) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[:layers], spec[-1]))
