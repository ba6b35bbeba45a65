"""The UMT5 text encoder that Wan reads prompts with.

Blocks are stacked on a leading layer axis and scanned; one block's parameters are also
enough to run that block alone, as `convert/prompt.py` does. Linears compute in the
config's `dtype`; norms, softmax and the residual stream are float32. Attention has no
scale and no positions but a learned bias for each distance, which every block owns.
Source: Wan-Video/Wan2.1, wan/modules/t5.py.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from cityrag_jax.model.layers import (
    XAVIER,
    RMSNorm,
    gelu_tanh,
    precision_of,
    stack_layers,
)


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; `attention_dim` is the width of all heads together.

    `dtype` is the arithmetic of the linears, `param_dtype` that of stored parameters.
    """

    vocab_size: int
    dim: int
    attention_dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"attention_dim = {self.attention_dim} does not divide over "
                f"{self.num_heads} heads; choose a multiple of {self.num_heads}."
            )

    @classmethod
    def xxl(cls, **changes: Any) -> "UMT5Config":
        """UMT5-XXL, the text encoder of every Wan 2.1 model."""
        sizes = dict(vocab_size=256_384, dim=4096, attention_dim=4096, num_heads=64)
        return cls(**dict(sizes, ffn_dim=10_240, num_layers=24) | changes)


def relative_buckets(
    offsets: Int[np.ndarray, "*shape"], num_buckets: int = 32, max_distance: int = 128
) -> Int32[np.ndarray, "*shape"]:
    """Give the row of the bias table for offsets "key index - query index".

    The second half of the rows is for keys behind the query. In each half the first
    half is a row per distance, the rest grows by logarithms, taken in float32 as
    torch does: at powers of two the truncation depends on it.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offsets)
    steps = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    near = np.where(distance < exact, distance, far)
    return (np.where(offsets > 0, half, 0) + near).astype(np.int32)


class Projection(nnx.Module):
    """y = x @ kernel in `dtype`: a linear without bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kernel = XAVIER(rngs.params(), (in_features, out_features), param_dtype)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.kernel[...].astype(self.dtype)
        x, precision = x.astype(self.dtype), precision_of(self.dtype)
        return jnp.einsum("...i,io->...o", x, kernel, precision=precision)


class BiasedAttention(nnx.Module):
    """softmax(q k^T + bias of the distance) v, unscaled, over the real keys."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        kinds = dict(dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
        self.q = Projection(c.dim, c.attention_dim, axes=("embed", "heads"), **kinds)
        self.k = Projection(c.dim, c.attention_dim, axes=("embed", "heads"), **kinds)
        self.v = Projection(c.dim, c.attention_dim, axes=("embed", "heads"), **kinds)
        self.o = Projection(c.attention_dim, c.dim, axes=("heads", "embed"), **kinds)
        table = jax.random.normal(rngs.params(), (c.num_buckets, c.num_heads))
        table = table * (2 * c.num_buckets * c.num_heads) ** -0.5
        self.position_bias = nnx.Param(table.astype(c.param_dtype), axes=(None, None))

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        q, k, v = (
            rearrange(part(x), "B L (N K) -> B L N K", N=self.config.num_heads)
            for part in (self.q, self.k, self.v)
        )
        einsum = partial(jnp.einsum, precision=precision_of(q.dtype))
        logits = einsum("BLNK,BSNK->BNLS", q, k, preferred_element_type=jnp.float32)
        logits = logits + self.bias(x.shape[1])[None]
        lowest = jnp.finfo(jnp.float32).min
        logits = jnp.where(mask[:, None, None, :], logits, lowest)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = einsum("BNLS,BSNK->BLNK", weights, v)
        return self.o(rearrange(out, "B L N K -> B L (N K)"))

    def bias(self, length: int) -> Float32[Array, "N L L"]:
        """Look up the bias of every head for every query and key."""
        sizes = self.config.num_buckets, self.config.max_distance
        rows = relative_buckets(np.arange(1 - length, length), *sizes)
        by_offset = self.position_bias[...].astype(jnp.float32)[rows]
        places = np.arange(length)[None, :] - np.arange(length)[:, None] + length - 1
        return rearrange(by_offset[places], "L S N -> N L S")


class GatedMLP(nnx.Module):
    """fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        c = config
        kinds = dict(dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
        self.gate = Projection(c.dim, c.ffn_dim, axes=("embed", "mlp"), **kinds)
        self.fc1 = Projection(c.dim, c.ffn_dim, axes=("embed", "mlp"), **kinds)
        self.fc2 = Projection(c.ffn_dim, c.dim, axes=("mlp", "embed"), **kinds)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(self.fc1(x) * gelu_tanh(self.gate(x)))


class UMT5Block(nnx.Module):
    """Attention and feed-forward, each behind its norm, on a float32 stream."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        norm = dict(param_dtype=config.param_dtype)
        self.norm1 = RMSNorm(config.dim, config.eps, **norm)
        self.attention = BiasedAttention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.dim, config.eps, **norm)
        self.ffn = GatedMLP(config, rngs=rngs)

    def __call__(
        self, x: Float32[Array, "B L D"], mask: Bool[Array, "B L"]
    ) -> Float32[Array, "B L D"]:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """Token ids to features, float32; rows behind the mask mean nothing."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        table = jax.random.normal(rngs.params(), (c.vocab_size, c.dim), c.param_dtype)
        self.token_embedding = nnx.Param(table, axes=(None, "embed"))
        self.blocks = stack_layers(
            lambda rngs: UMT5Block(c, rngs=rngs), c.num_layers, rngs
        )
        self.norm = RMSNorm(c.dim, c.eps, param_dtype=c.param_dtype)

    def __call__(
        self,
        ids: Int[Array | np.ndarray, "B L"],
        mask: Bool[Array | np.ndarray, "B L"] | Int[Array | np.ndarray, "B L"],
    ) -> Float32[Array, "B L D"]:
        """Encode; `mask` is 1 for real tokens, whose first are never padding."""
        x = self.token_embedding[...][jnp.asarray(ids)].astype(jnp.float32)
        real = jnp.asarray(mask) != 0

        def step(x, block):
            return block(x, real), None

        return self.norm(jax.lax.scan(step, x, self.blocks)[0])
