"""The pose branch: relative camera poses added behind every block (section 3.2)."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from cityrag_jax.batch import TIME_STRIDE, Conditions
from cityrag_jax.model.branch import Branch, Prepared, TokenGrid, add
from cityrag_jax.model.dit import DiTConfig
from cityrag_jax.model.layers import MLP, ZEROS, Linear, stack_layers
from cityrag_jax.parallel import shard

HIGHEST = jax.lax.Precision.HIGHEST  # so that a float32 passes unchanged


class PoseEncoder(nnx.Module):
    """4x4 poses -> Conv1D over groups of four frames -> MLP: a vector a latent frame.

    Three copies of frame 0 stand in front, so that groups fall as the VAE's do: frame 0
    alone, then fours (padding, widths and SiLU *assumed*).
    """

    def __init__(self, config: DiTConfig, hidden: int, *, rngs: nnx.Rngs):
        kinds = dict(dtype=jnp.float32, param_dtype=config.param_dtype)
        # A convolution whose stride is its width is a linear map of each group.
        self.conv = Linear(
            TIME_STRIDE * 16, hidden, axes=(None, None), rngs=rngs, **kinds
        )
        self.mlp = MLP((hidden, hidden, hidden), jax.nn.silu, rngs=rngs, **kinds)

    def embed(self, poses: Float[Array, "B T 4 4"]) -> Float[Array, "B t H"]:
        """Embed every latent frame's group of poses: 73 frames give 19 vectors."""
        groups = (poses.shape[1] + TIME_STRIDE - 1) // TIME_STRIDE
        first = jnp.repeat(poses[:, :1], TIME_STRIDE - 1, axis=1)
        padded = jnp.concatenate([first, poses], axis=1)[:, : groups * TIME_STRIDE]
        flat = rearrange(padded, "B (t k) i j -> B t (k i j)", k=TIME_STRIDE)
        return self.mlp(jax.nn.silu(self.conv(flat)))


class TrajectoryEncoder(PoseEncoder, Branch):
    """The encoded poses of the target, one projection a block.

    The projections start at zero. `keep_pose` multiplies behind their bias.
    """

    condition = "pose"

    def __init__(self, config: DiTConfig, *, hidden: int = 512, rngs: nnx.Rngs):
        super().__init__(config, hidden, rngs=rngs)
        kinds = dict(dtype=jnp.float32, param_dtype=config.param_dtype)
        self.projection = stack_layers(
            lambda rngs: Linear(
                hidden, config.dim, axes=(None, "embed"), init=ZEROS, rngs=rngs, **kinds
            ),
            config.num_layers,
            rngs,
        )

    def prepare(self, conditions: Conditions) -> Prepared:
        """Make every block's addend [layers, B, t, D]."""
        embedded = self.embed(conditions.poses)
        addends = jax.vmap(lambda project: project(embedded))(self.projection)
        keep = conditions.keep_pose
        if keep is not None:
            addends = addends * keep.astype(jnp.float32)[None, :, None, None]
        return Prepared(None, addends)

    def after_block(
        self,
        layer: None,
        x: Float[Array, "B L D"],
        grid: TokenGrid,
        prepared: Prepared,
    ) -> Float[Array, "B L D"]:
        """Add the block's vector of each latent frame to all of the frame's tokens."""
        t, h, w = grid.shape
        if prepared.layerwise.shape[1] != t:
            raise ValueError(
                f"Poses make {prepared.layerwise.shape[1]} latent frames, the video "
                f"has {t}; give one pose a frame."
            )
        # By a product, so that the gradient is summed on the devices where the tokens
        # are: frames do not begin where the shards do, and behind a repetition each
        # device would be sent all tokens. Padded tokens are in no frame.
        frames = jax.nn.one_hot(jnp.arange(x.shape[1]) // (h * w), t)
        frames = shard(frames, "tokens", None)
        addend = jnp.einsum(
            "Lt,BtD->BLD", frames, prepared.layerwise, precision=HIGHEST
        )
        return add(x, addend)
