"""Low-rank adapters (LoRA, arXiv:2106.09685): small trained maps beside frozen linears.

    y = x kernel + bias + (alpha / rank) x down up

`up` starts at zero, so a new adapter changes nothing. Parameters are called
`blocks.self_attention.q.adapter.down`, stacked where their linear is.
"""

import fnmatch
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cityrag_jax.model.layers import Linear, affine

MARK = ".adapter."  # in the names of an adapter's parameters, and of no others


class LowRank(nnx.Module):
    """What an adapter adds to its linear: `scale` x down up, in the linear's type."""

    def __init__(self, linear: Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        *layers, width, out = linear.kernel.get_value().shape
        inward, outward = linear.kernel.get_metadata()["axes"]
        dtype = linear.kernel.get_value().dtype
        bound = width**-0.5
        shape = (*layers, width, rank)
        down = jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)
        self.down = nnx.Param(down, axes=(inward, None))
        self.up = nnx.Param(
            jnp.zeros((*layers, rank, out), dtype), axes=(None, outward)
        )
        self.scale = scale
        self.dtype: DTypeLike = linear.dtype

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        down, up = self.down[...], self.up[...]
        inner = affine(x.astype(self.dtype), down, jnp.zeros(down.shape[-1]))
        return self.scale * affine(inner, up, jnp.zeros(up.shape[-1]))


def add_adapters(
    model: nnx.Module,
    linears: Sequence[str],
    rank: int,
    alpha: float,
    *,
    rngs: nnx.Rngs,
) -> None:
    """Give an adapter to every linear whose path fits one of the patterns.

    Paths are like `blocks.self_attention.q` and `branches.1.layers.attention.o`.
    Raises ValueError for a pattern that fits none, or one that has an adapter already.
    """
    if rank < 1:
        raise ValueError(f"An adapter's rank is {rank}; give 1 or more.")
    found = dict(_linears(model))
    for pattern in linears:
        if not fnmatch.filter(found, pattern):
            raise ValueError(
                f"The adapters' linears have {pattern!r}, which fits none; paths are "
                f"like {', '.join([n for n in found if 'attention' in n][:3])}."
            )
    for name, linear in found.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in linears):
            continue
        if linear.adapter is not None:
            raise ValueError(f"{name} has an adapter already; name every linear once.")
        linear.adapter = LowRank(linear, rank, alpha / rank, rngs=rngs)


def adapter_scales(model: nnx.Module) -> dict[str, float]:
    """Map the kernel of every linear that has an adapter to the adapter's scale."""
    return {
        f"{name}.kernel": linear.adapter.scale
        for name, linear in _linears(model)
        if linear.adapter is not None
    }


def _linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module
