"""The CLIP image tower as Wan uses it: all blocks but the last, every token.

Blocks are stacked on a leading layer axis and scanned. Linears compute in the config's
`dtype`, norms and the residual stream are float32.
Source: Wan-Video/Wan2.1, wan/modules/clip.py (ViT-H/14 of the XLM-RoBERTa CLIP).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cityrag_jax import parallel
from cityrag_jax.model.attention import attend
from cityrag_jax.model.layers import (
    MLP,
    XAVIER,
    LayerNorm,
    Linear,
    gelu_exact,
    precision_of,
    stack_layers,
)

COLOURS = 3


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the tower; `num_layers` counts the checkpoint's blocks.

    The last block is neither kept nor run: Wan takes what it would have been given.
    """

    image_size: int
    patch_size: int
    dim: int
    num_heads: int
    mlp_dim: int
    num_layers: int
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if self.image_size % self.patch_size or self.dim % self.num_heads:
            raise ValueError(
                f"An image of {self.image_size} pixels needs whole patches of "
                f"{self.patch_size}, a width of {self.dim} whole heads of "
                f"{self.num_heads}; choose sizes that divide."
            )
        if self.num_layers < 2:
            raise ValueError(
                f"num_layers = {self.num_layers} leaves no block to run: it counts "
                "the checkpoint's blocks, of which the last is not run; give 2 or more."
            )

    @property
    def num_tokens(self) -> int:
        """Class token and patches: 257 for 224 pixels in patches of 14."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def vit_h_14(cls, **changes: Any) -> "CLIPVisionConfig":
        """ViT-H/14, the image encoder of Wan 2.1 image-to-video."""
        sizes = dict(image_size=224, patch_size=14, dim=1280, num_heads=16)
        return cls(**dict(sizes, mlp_dim=5120, num_layers=32) | changes)


class CLIPBlock(nnx.Module):
    """Self-attention and feed-forward, each behind its norm."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        kinds = dict(dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
        self.norm1 = LayerNorm(c.dim, c.eps, param_dtype=c.param_dtype)
        self.qkv = Linear(c.dim, 3 * c.dim, axes=("embed", "heads"), **kinds)
        self.proj = Linear(c.dim, c.dim, axes=("heads", "embed"), **kinds)
        self.norm2 = LayerNorm(c.dim, c.eps, param_dtype=c.param_dtype)
        self.mlp = MLP((c.dim, c.mlp_dim, c.dim), gelu_exact, **kinds)

    def __call__(self, x: Float32[Array, "B L D"]) -> Float32[Array, "B L D"]:
        qkv = self.qkv(self.norm1(x))
        heads = dict(c=3, N=self.config.num_heads)
        q, k, v = rearrange(qkv, "B L (c N K) -> c B L N K", **heads)
        out = parallel.share_keys(attend, q, k, v)
        x = x + self.proj(rearrange(out, "B L N K -> B L (N K)"))
        return x + self.mlp(self.norm2(x))


class CLIPVision(nnx.Module):
    """Normalised pixels to the features of class token and patches, float32."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        patch = (COLOURS * c.patch_size**2, c.dim)
        kernel = XAVIER(rngs.params(), patch, c.param_dtype)
        self.patch_kernel = nnx.Param(kernel, axes=(None, "embed"))
        scale = c.dim**-0.5
        token = scale * jax.random.normal(rngs.params(), (c.dim,))
        self.class_token = nnx.Param(token.astype(c.param_dtype), axes=(None,))
        places = scale * jax.random.normal(rngs.params(), (c.num_tokens, c.dim))
        self.positions = nnx.Param(places.astype(c.param_dtype), axes=(None, None))
        self.pre_norm = LayerNorm(c.dim, c.eps, param_dtype=c.param_dtype)
        self.blocks = stack_layers(
            lambda rngs: CLIPBlock(c, rngs=rngs), c.num_layers - 1, rngs
        )

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B S D"]:
        """Encode images of the config's size, normalised by `encode.clip_pixels`."""
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(
                f"CLIP takes {size}x{size} pixels, got "
                f"{pixels.shape[1]}x{pixels.shape[2]}; encode.clip_pixels resizes."
            )

        def step(x, block):
            return block(x), None

        return jax.lax.scan(step, self.pre_norm(self._embed(pixels)), self.blocks)[0]

    def _embed(self, pixels):
        side, dtype = self.config.patch_size, self.config.dtype
        patches = rearrange(
            pixels, "B (h p) (w q) C -> B (h w) (C p q)", p=side, q=side
        )
        kernel = self.patch_kernel[...].astype(dtype)
        patches, precision = patches.astype(dtype), precision_of(dtype)
        x = jnp.einsum("BLI,ID->BLD", patches, kernel, precision=precision)
        token = self.class_token[...].astype(dtype)[None, None, :]
        token = jnp.broadcast_to(token, (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1).astype(jnp.float32)
        return x + self.positions[...].astype(jnp.float32)[None]
