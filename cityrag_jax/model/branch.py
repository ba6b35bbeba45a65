"""A condition's way into the transformer's blocks: the interface of its branches."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from cityrag_jax.batch import Conditions
from cityrag_jax.model.layers import normalise


class Modulation(NamedTuple):
    """Shift, scale and gate of one residual step, float32."""

    shift: Float[Array, "B 1 D"]
    scale: Float[Array, "B 1 D"]
    gate: Float[Array, "B 1 D"]

    def modulate(self, x: Float[Array, "B L D"], eps: float) -> Float[Array, "B L D"]:
        """m(x) = LN(x) (1 + scale) + shift."""
        return normalise(x, eps) * (1 + self.scale) + self.shift


class Prepared(NamedTuple):
    """What a branch made of a clip's conditions, once for all steps of the sampler.

    `layerwise` has a leading layer axis and is scanned beside the blocks.
    """

    shared: PyTree
    layerwise: PyTree = None


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of a video stand: their grid, rotary angles and true count.

    `length` is None unless tokens were padded to divide over the sequence axis.
    """

    shape: tuple[int, int, int]
    angles: Float[Array, "L R 2"]
    length: Int[Array, " B"] | None


class Branch(nnx.Module):
    """A condition's way into the blocks: `layers` are stacked, the hooks see one.

    `condition` is "pose" or "geo": guidance drops branches by that name.
    """

    condition: str
    layers: nnx.Module | None = None

    def prepare(self, conditions: Conditions) -> Prepared:
        """Do whatever is the same for every timestep and block."""
        raise NotImplementedError

    def with_keys(self, prepared: Prepared) -> Prepared:
        """Do what is the same for every timestep alone: memory for each block."""
        return prepared

    def after_self_attention(
        self,
        layer: nnx.Module | None,
        x: Float[Array, "B L D"],
        modulation: Modulation,
        grid: TokenGrid,
        prepared: Prepared,
    ) -> Float[Array, "B L D"]:
        """Change the residual stream between self- and cross-attention."""
        return x

    def after_block(
        self,
        layer: nnx.Module | None,
        x: Float[Array, "B L D"],
        grid: TokenGrid,
        prepared: Prepared,
    ) -> Float[Array, "B L D"]:
        """Change the residual stream behind the block."""
        return x


def add(x: Float[Array, "B L D"], update: Float[Array, "B _ D"]) -> Float[Array, "..."]:
    """Add to the residual stream in float32; it keeps its type."""
    return (x.astype(jnp.float32) + update.astype(jnp.float32)).astype(x.dtype)
