"""The geospatial branch: cross-attention to the retrieved video (section 3.2).

In every block, behind the self-attention, with m the block's own modulated norm:

    x <- x + keep gate_a GeoAttn(queries m(x), keys and values LN_k(c))

c are the condition's tokens by their own patch embedding. LN_k has an affine for each
block and no timestep, so keys and values are the same for all steps. Place, modulation
and gate are *assumed*: the paper says that keys and values of cross-attention layers
are duplicated from the base's self-attention and trained.
"""

import math
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cityrag_jax.batch import Conditions, token_grid
from cityrag_jax.int8 import dense
from cityrag_jax.model.attention import Keys, RotaryAttention
from cityrag_jax.model.branch import Branch, Modulation, Prepared, TokenGrid, add
from cityrag_jax.model.dit import DiTConfig, WanDiT, pad_tokens, patchify
from cityrag_jax.model.layers import (
    ZEROS,
    LayerNorm,
    Linear,
    normalise,
    rotary_angles,
    stack_layers,
)
from cityrag_jax.model.trajectory_encoder import PoseEncoder

# How the output projections `o` of a branch start that is begun upon a base.
OUTPUTS = ("zero", "copy", "scaled_copy")
OUTPUT_SCALE = 0.1  # of a scaled copy (assumed)


class GeoLayer(nnx.Module):
    """One block's geo attention and the norm of its keys and values."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        kinds = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        self.norm = LayerNorm(config.dim, config.eps, param_dtype=config.param_dtype)
        self.attention = RotaryAttention(
            config.dim,
            config.num_heads,
            config.eps,
            name="geo_attention",
            rngs=rngs,
            **kinds,
        )
        self.attention.o.kernel.set_value(
            jnp.zeros_like(self.attention.o.kernel.get_value())
        )


class ViewPoses(PoseEncoder):
    """The poses of the condition's own cameras, one projection for its tokens.

    It starts at zero: a new one changes nothing.
    """

    def __init__(self, config: DiTConfig, hidden: int, *, rngs: nnx.Rngs):
        super().__init__(config, hidden, rngs=rngs)
        kinds = dict(dtype=jnp.float32, param_dtype=config.param_dtype)
        self.projection = Linear(
            hidden, config.dim, axes=(None, "embed"), init=ZEROS, rngs=rngs, **kinds
        )

    def __call__(self, poses: Float[Array, "B F 4 4"]) -> Float[Array, "B u D"]:
        return self.projection(self.embed(poses))


class Seen(NamedTuple):
    """What all blocks see of a condition video: normalised tokens and their angles.

    `length` counts those that are real; `keep` is 0 for clips that drop the condition.
    Tokens are None where the keys of all blocks were made of them.
    """

    tokens: Float[Array, "B S D"] | None
    angles: Float[Array, "S R 2"]
    length: Int[Array, " B"]
    keep: Float[Array, "B 1 1"] | None

    def keys(self, layer: GeoLayer) -> Keys:
        """Make the keys and values of a block."""
        return layer.attention.keys(layer.norm.affine(self.tokens), self.angles)


class GeoBranch(Branch):
    """Lets the tokens of the target look at those of the condition video.

    The output projections start at zero, so a new branch changes nothing. For training
    from scratch, `same_place_bias` starts the biases of queries and keys at that value:
    rotary positions then prefer the condition's token at the same place.

    Begun upon a base, `output` says what they start as: "zero" (*assumed*), a "copy" of
    the block's own (the paper: layers are duplicated) or a "scaled_copy", a tenth of
    it. Small rates limit what can become of zero. Muon moves a matrix by an RMS of 0.2
    times the rate: at 1e-5 by 2e-6 an update, by 0.04 in 20,000 that all point one way,
    by 0.0003 where they point anywhere. A fresh matrix of 5120 (Xavier) has 0.014: from
    zero that is 7,000 updates one way, or never. A scaled copy has a tenth of it at
    once, which 700 updates can undo.

    With `view_poses`, the width of their encoder, the condition's tokens also know
    where their cameras stood from the target's first one (an addition to the paper,
    whose condition is pictures alone): how far a wall must move between two lanes then
    need not be read off them.
    """

    condition = "geo"

    def __init__(
        self,
        config: DiTConfig,
        *,
        latent_channels: int = 16,
        same_place_bias: float = 0.0,
        output: str = "zero",
        view_poses: int = 0,
        rngs: nnx.Rngs,
    ):
        if output not in OUTPUTS:
            raise ValueError(f"model.geo.output is {output!r}; choose of {OUTPUTS}.")
        self.patch_embedding = Linear(
            math.prod(config.patch) * latent_channels,
            config.dim,
            axes=(None, "embed"),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda rngs: GeoLayer(config, rngs=rngs), config.num_layers, rngs
        )
        for linear in (self.layers.attention.q, self.layers.attention.k):
            bias = linear.bias.get_value()
            linear.bias.set_value(jnp.full_like(bias, same_place_bias))
        self.view_poses = (
            ViewPoses(config, view_poses, rngs=rngs) if view_poses else None
        )
        self.patch, self.head_dim = config.patch, config.head_dim
        self.eps = config.eps
        self.output = output

    def prepare(self, conditions: Conditions) -> Prepared:
        """Embed the condition video: tokens, their angles, how many count, `keep`."""
        shape = token_grid(conditions.geo_latents.shape[1:4], self.patch)
        tokens = self.patch_embedding(patchify(conditions.geo_latents, self.patch))
        tokens = tokens.astype(jnp.float32)
        if self.view_poses is not None:
            if conditions.geo_poses is None:
                raise ValueError(
                    "The model has view_poses: give the condition's own camera poses "
                    "(Clip.first_from_view, Conditions.geo_poses)."
                )
            frames = self.view_poses(conditions.geo_poses)
            tokens += jnp.repeat(frames, shape[1] * shape[2], axis=1)
        tokens, angles, _ = pad_tokens(tokens, rotary_angles(shape, self.head_dim))
        length = conditions.geo_length.astype(jnp.int32) * (shape[1] * shape[2])
        keep = conditions.keep_geo
        if keep is not None:
            keep = keep.astype(jnp.float32)[:, None, None]
        return Prepared(Seen(normalise(tokens, self.eps), angles, length, keep))

    def with_keys(self, prepared: Prepared) -> Prepared:
        """Make the keys and values of all blocks, heads split over the devices."""
        seen = prepared.shared
        keys = jax.lax.map(lambda layer: seen.keys(layer).gathered(), self.layers)
        return Prepared(seen._replace(tokens=None), keys)

    def after_self_attention(
        self,
        layer: GeoLayer,
        x: Float[Array, "B L D"],
        modulation: Modulation,
        grid: TokenGrid,
        prepared: Prepared,
    ) -> Float[Array, "B L D"]:
        """Add what the block's geo attention reads from the condition."""
        seen, keys = prepared.shared, prepared.layerwise
        if keys is None:
            keys = seen.keys(layer)
        m = modulation.modulate(x, self.eps)
        out = layer.attention(m, grid.angles, keys, seen.length)
        out = modulation.gate * out
        return add(x, out if seen.keep is None else seen.keep * out)


# What a new branch takes from the base, name by name; the rest stays as it is made:
# the norm of keys the identity, `o` zero if nothing else is chosen. Of the patch
# embedding the first rows: those of the noise channels, for a clean latent is what they
# see as the noise vanishes.
FROM_BASE = {
    f"patch_embedding.{leaf}": f"patch_embedding.{leaf}" for leaf in ("kernel", "bias")
} | {
    f"layers.attention.{leaf}": f"blocks.self_attention.{leaf}"
    for leaf in (
        *(f"{linear}.{leaf}" for linear in "qkv" for leaf in ("kernel", "bias")),
        *("norm_q.scale", "norm_k.scale"),
    )
}


def copy_from_base(branch: GeoBranch, base: WanDiT) -> None:
    """Start a branch from the base as `FROM_BASE` and its `output` say."""
    for ours, theirs in FROM_BASE.items():
        target = reduce(getattr, ours.split("."), branch)
        source = reduce(getattr, theirs.split("."), base).get_value()
        kind = target.get_value().dtype  # a frozen base may be in another type
        target.set_value(jnp.array(dense(source, kind)[: target.shape[0]]))
    if branch.output == "zero":
        return
    scale = OUTPUT_SCALE if branch.output == "scaled_copy" else 1
    ours, theirs = branch.layers.attention.o, base.blocks.self_attention.o
    for target, source in ((ours.kernel, theirs.kernel), (ours.bias, theirs.bias)):
        kind = target.get_value().dtype
        target.set_value((scale * dense(source.get_value(), kind)).astype(kind))
