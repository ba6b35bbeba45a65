"""The Wan 2.1 diffusion transformer, text-to-video and image-to-video.

Blocks are stacked on a leading layer axis and scanned. Branches add conditions: each is
prepared once a clip and hooks into every block. Without branches it is Wan alone.
Source: Wan-Video/Wan2.1, wan/modules/model.py.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cityrag_jax.batch import PATCH, Conditions, token_grid
from cityrag_jax.model.attention import (
    ImageTextAttention,
    Keys,
    RotaryAttention,
    TextAttention,
)
from cityrag_jax.model.branch import Branch, Modulation, Prepared, TokenGrid, add
from cityrag_jax.model.layers import (
    MLP,
    ZEROS,
    LayerNorm,
    Linear,
    gelu_exact,
    gelu_tanh,
    normalise,
    rotary_angles,
    stack_layers,
    timestep_embedding,
)
from cityrag_jax.parallel import axis_size, shard

IMAGE_EPS = 1e-5  # the image embedding's norms alone differ from `eps`
SMALL_NORMAL = jax.nn.initializers.normal(0.02)

# What a rematerialised block may keep for its backward pass: the residuals of its
# fused kernels, and the residual stream that it starts from, which stays on the device
# where nothing else is said.
BLOCK_INPUT = "block_input"
REMAT_NAMES = ("self_attention", "geo_attention", BLOCK_INPUT)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan transformer; `image_dim` None means no image cross-attention.

    A token is `patch` latent places high and wide: Wan's 2x2 are 16x16 pixels.

    `dtype` is the arithmetic of linears and attention, `param_dtype` that of stored
    parameters, `stream_dtype` what the residual stream is kept in between its sums:
    float32 as in the official code, or half of that memory and traffic. `unroll`
    blocks make one turn of the loop over blocks: small ones train faster so, for what
    the backward pass needs of them is not copied into stacks.

    `remat` recomputes blocks in the backward pass, except what `keep` and `offload`
    name of `REMAT_NAMES`: the one stays on the device, the other waits in the host's
    memory. An attention of L queries keeps its result and log-sum-exp, 2 L dim bytes
    (bfloat16) a block, and spares its forward kernel a second run. The short
    cross-attention is always recomputed.
    """

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int = 16
    patch: tuple[int, int] = (PATCH, PATCH)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    stream_dtype: DTypeLike = jnp.float32
    unroll: int = 1
    remat: bool = False
    keep: tuple[str, ...] = ("self_attention", "geo_attention")
    offload: tuple[str, ...] = ()

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim = {self.dim} over {self.num_heads} heads must give an even head "
                f"width; choose dim as a multiple of {2 * self.num_heads}."
            )
        named = (*self.keep, *self.offload)
        if not set(named) <= set(REMAT_NAMES) or len(set(named)) < len(named):
            raise ValueError(
                f"keep = {self.keep} and offload = {self.offload} must name different "
                f"ones of {REMAT_NAMES}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads

    @classmethod
    def i2v_14b(cls, **changes: Any) -> "DiTConfig":
        """Wan 2.1 I2V-14B; 480P and 720P differ in weights alone."""
        return cls(**dict(_WAN_14B, in_channels=36, image_dim=1280) | changes)

    @classmethod
    def t2v_14b(cls, **changes: Any) -> "DiTConfig":
        """Wan 2.1 T2V-14B."""
        return cls(**dict(_WAN_14B, in_channels=16) | changes)

    @classmethod
    def t2v_1_3b(cls, **changes: Any) -> "DiTConfig":
        """Wan 2.1 T2V-1.3B."""
        sizes = dict(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
        return cls(**dict(sizes, in_channels=16) | changes)


_WAN_14B = dict(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)


class Stream(NamedTuple):
    """Tokens on their way through the blocks: as they start, their times and places."""

    x: Float[Array, "B L D"]
    time: Float[Array, "B D"]
    time6: Float[Array, "B 6 D"]
    grid: TokenGrid


class Context(NamedTuple):
    """Embedded rows of text and image, or every block's keys of them (stacked)."""

    rows: tuple[Float[Array, "B S D"], Float[Array, "B I D"] | None] | None
    keys: tuple[Keys, ...] | None = None


class Block(nnx.Module):
    """Self-attention, cross-attention and feed-forward on the residual stream."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        kinds = dict(dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs)
        size = (config.dim, config.num_heads, config.eps)
        cross = TextAttention if config.image_dim is None else ImageTextAttention
        self.modulation = _modulation_table(6, config, rngs)
        self.self_attention = RotaryAttention(*size, name="self_attention", **kinds)
        self.cross_norm = LayerNorm(
            config.dim, config.eps, param_dtype=config.param_dtype
        )
        self.cross_attention = cross(*size, **kinds)
        self.ffn = MLP((config.dim, config.ffn_dim, config.dim), gelu_tanh, **kinds)
        self.eps = config.eps

    def __call__(self, x, time, context, grid, hooks):
        """Run the block; `context` holds its cross-attention's keys."""
        attention, feed_forward = self.modulations(time)

        m = attention.modulate(x, self.eps)
        x = add(
            x,
            attention.gate
            * self.self_attention(
                m, grid.angles, self.self_attention.keys(m, grid.angles), grid.length
            ),
        )
        for branch, layer, prepared in hooks:
            x = branch.after_self_attention(layer, x, attention, grid, prepared)
        x = add(x, self.cross_attention(self.cross_norm(x), context))
        m = feed_forward.modulate(x, self.eps)
        x = add(x, feed_forward.gate * self.ffn(m))
        for branch, layer, prepared in hooks:
            x = branch.after_block(layer, x, grid, prepared)
        return shard(x, "batch", "tokens", None)

    def modulations(self, time: Float[Array, "B 6 D"]) -> tuple[Modulation, Modulation]:
        """Give the modulation of self-attention and that of the feed-forward."""
        vectors = self.modulation[...].astype(jnp.float32)[None] + time
        parts = jnp.split(vectors, 6, axis=1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])


class Head(nnx.Module):
    """Modulated norm and the map to velocity patches, all in float32."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.modulation = _modulation_table(2, config, rngs)
        self.linear = Linear(
            config.dim,
            math.prod(config.patch) * config.out_channels,
            axes=("embed", None),
            dtype=jnp.float32,
            param_dtype=config.param_dtype,
            init=ZEROS,
            rngs=rngs,
        )
        self.eps = config.eps

    def __call__(
        self, x: Float[Array, "B L D"], time: Float[Array, "B D"]
    ) -> Float[Array, "B L P"]:
        vectors = self.modulation[...].astype(jnp.float32)[None] + time[:, None]
        shift, scale = jnp.split(vectors, 2, axis=1)
        return self.linear(normalise(x, self.eps) * (1 + scale) + shift)


class ImageEmbedding(nnx.Module):
    """CLIP features to the transformer's width: norm, MLP with exact GELU, norm."""

    def __init__(self, width: int, dim: int, *, dtype, param_dtype, rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = LayerNorm(width, IMAGE_EPS, param_dtype=param_dtype)
        self.mlp = MLP((width, width, dim), gelu_exact, **kinds)
        self.norm2 = LayerNorm(dim, IMAGE_EPS, param_dtype=param_dtype)

    def __call__(self, image: Float[Array, "B I E"]) -> Float[Array, "B I D"]:
        return self.norm2(self.mlp(self.norm1(image)))


class WanDiT(nnx.Module):
    """Velocity of noisy latents under text, image and whatever the branches bring."""

    def __init__(
        self, config: DiTConfig, *, branches: tuple[Branch, ...] = (), rngs: nnx.Rngs
    ):
        c = self.config = config
        kinds = dict(dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
        float32 = dict(kinds, dtype=jnp.float32)
        self.patch_embedding = Linear(
            math.prod(c.patch) * c.in_channels, c.dim, axes=(None, "embed"), **kinds
        )
        self.text_embedding = MLP(
            (c.text_dim, c.dim, c.dim), gelu_tanh, init=SMALL_NORMAL, **kinds
        )
        self.time_embedding = MLP(
            (c.freq_dim, c.dim, c.dim), jax.nn.silu, init=SMALL_NORMAL, **float32
        )
        self.time_projection = Linear(
            c.dim, 6 * c.dim, axes=("embed", "mlp"), **float32
        )
        self.image_embedding = (
            None if c.image_dim is None else ImageEmbedding(c.image_dim, c.dim, **kinds)
        )
        self.blocks = stack_layers(lambda rngs: Block(c, rngs=rngs), c.num_layers, rngs)
        self.head = Head(c, rngs=rngs)
        self.branches = nnx.data(tuple(branches))

    def prepare(
        self,
        conditions: Conditions,
        *,
        without: Collection[str] = (),
        keep_keys: bool = False,
    ) -> tuple[Prepared | None, ...]:
        """Prepare every branch once a clip; one whose condition is dropped is None.

        `without` drops conditions by name: their branches are not computed. `keep_keys`
        is for sampling, where the same keys serve all steps.
        """
        ready = [
            None if branch.condition in without else branch.prepare(conditions)
            for branch in self.branches
        ]
        if keep_keys:
            pairs = zip(self.branches, ready, strict=True)
            ready = [one and branch.with_keys(one) for branch, one in pairs]
        return tuple(ready)

    def prepare_context(
        self,
        text: Float[Array, "B S E"],
        image: Float[Array, "B 257 I"] | None = None,
        *,
        keep_keys: bool = False,
    ) -> Context:
        """Embed text and image once a clip, with `keep_keys` make all blocks' keys."""
        rows = self.embed_context(text, image)
        if not keep_keys:
            return Context(rows)
        return Context(
            None, jax.lax.map(lambda b: b.cross_attention.keys(*rows), self.blocks)
        )

    def __call__(
        self,
        latents: Float[Array, "B t h w C"],
        timesteps: Float[Array, " B"],
        text: Float[Array, "B S E"],
        image: Float[Array, "B 257 I"] | None = None,
        prepared: tuple[Prepared | None, ...] = (),
    ) -> Float[Array, "B t h w O"]:
        """Predict noise minus data, float32: `start`, `run` and `finish`.

        `latents`: noise channels, then for image-to-video 4 mask and 16 image channels.
        `timesteps` in [0, 1000]. `text` is padded with zeros to `text_len`, and the
        padding is attended to. `prepared` is what `prepare` gave, or empty.
        """
        stream = self.start(latents, timesteps)
        x = self.run(stream, self.prepare_context(text, image), prepared)
        return self.finish(stream, x)

    def start(
        self, latents: Float[Array, "B t h w C"], timesteps: Float[Array, " B"]
    ) -> Stream:
        """Embed latents and times: what a step cache computes in every step."""
        time, time6 = self.embed_time(timesteps)
        patch = self.config.patch
        shape = token_grid(latents.shape[1:4], patch)
        x = self.patch_embedding(patchify(latents, patch))
        x = x.astype(self.config.stream_dtype)
        x, angles, length = pad_tokens(x, rotary_angles(shape, self.config.head_dim))
        x = shard(x, "batch", "tokens", None)
        return Stream(x, time, time6, TokenGrid(shape, angles, length))

    def finish(
        self, stream: Stream, x: Float[Array, "B L D"]
    ) -> Float[Array, "B t h w O"]:
        """Make the velocity of what the blocks made of the tokens."""
        shape = stream.grid.shape
        patches = self.head(x, stream.time)[:, : math.prod(shape)]
        return unpatchify(patches, shape, self.config.patch)

    def embed_time(
        self, timesteps: Float[Array, " B"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 6 D"]]:
        """Give the time embedding and its projection to six vectors, float32."""
        time = self.time_embedding(timestep_embedding(timesteps, self.config.freq_dim))
        six = self.time_projection(jax.nn.silu(time))
        return time, rearrange(six, "B (n D) -> B n D", n=6)

    def embed_context(
        self, text: Float[Array, "B S E"], image: Float[Array, "B 257 I"] | None
    ) -> tuple[Array, Array | None]:
        """Embed zero-padded text rows and, for image-to-video, the image rows."""
        config = self.config
        if text.shape[1] > config.text_len:
            raise ValueError(
                f"Text has {text.shape[1]} rows, the model takes {config.text_len}; "
                "truncate it."
            )
        if (image is None) != (self.image_embedding is None):
            raise ValueError(
                f"Image features are {'absent' if image is None else 'given'} but the "
                f"model's image_dim is {config.image_dim}; they go together."
            )
        missing = config.text_len - text.shape[1]
        text = self.text_embedding(jnp.pad(text, ((0, 0), (0, missing), (0, 0))))
        return text, None if image is None else self.image_embedding(image)

    def run(
        self,
        stream: Stream,
        context: Context,
        prepared: tuple[Prepared | None, ...] = (),
    ) -> Float[Array, "B L D"]:
        """Run all blocks on the tokens."""
        active = [
            (branch, ready)
            for branch, ready in zip(self.branches, prepared, strict=bool(prepared))
            if ready is not None
        ]

        def step(x, layer):
            block, branch_layers, layerwise, keys = layer
            x = checkpoint_name(x, BLOCK_INPUT)
            if keys is None:
                keys = block.cross_attention.keys(*context.rows)
            hooks = [
                (branch, branch_layer, ready._replace(layerwise=own))
                for (branch, ready), branch_layer, own in zip(
                    active, branch_layers, layerwise, strict=True
                )
            ]
            return block(x, stream.time6, keys, stream.grid, hooks), None

        if self.config.remat:
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=self.config.keep,
                names_which_can_be_offloaded=self.config.offload,
                offload_src="device",
                offload_dst="pinned_host",
            )
            step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        layers = [branch.layers for branch, _ in active]
        layerwise = [ready.layerwise for _, ready in active]
        stacks = self.blocks, layers, layerwise, context.keys
        return jax.lax.scan(step, stream.x, stacks, unroll=self.config.unroll)[0]


def patchify(
    latents: Float[Array, "B t h w C"], patch: tuple[int, int]
) -> Float[Array, "B L P"]:
    """Cut into patches, flattened channel first; tokens run t, h, w."""
    p, q = patch
    return rearrange(latents, "B t (h p) (w q) C -> B (t h w) (C p q)", p=p, q=q)


def unpatchify(
    tokens: Float[Array, "B L P"], grid: tuple[int, int, int], patch: tuple[int, int]
) -> Float[Array, "B t h w C"]:
    """Put the head's patches together; here the channel is the fastest axis."""
    (t, h, w), (p, q) = grid, patch
    order = "B (t h w) (p q C) -> B t (h p) (w q) C"
    return rearrange(tokens, order, t=t, h=h, w=w, p=p, q=q)


def pad_tokens(
    x: Float[Array, "B L D"], angles: Float[Array, "L R 2"]
) -> tuple[Array, Array, Array | None]:
    """Pad tokens to a multiple of the sequence axis; give their true count if padded.

    The official sequence-parallel code attends to such padding; here it is masked.
    """
    count = x.shape[1]
    missing = -count % axis_size("sequence")
    if missing == 0:
        return x, angles, None
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    angles = jnp.pad(angles, ((0, missing), (0, 0), (0, 0)))
    return x, angles, jnp.full(x.shape[0], count, jnp.int32)


def _modulation_table(rows: int, config: DiTConfig, rngs: nnx.Rngs) -> nnx.Param:
    table = jax.random.normal(rngs.params(), (rows, config.dim)) * config.dim**-0.5
    return nnx.Param(table.astype(config.param_dtype), axes=(None, None))
