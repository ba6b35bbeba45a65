"""The two types that cross floors, and the arithmetic of frames, latents and tokens.

Frames count time in the video, latent frames after the VAE (1 + 4 + 4 + ... frames
each), tokens after the transformer's 1x2x2 patches. Every such count is made here.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8, UInt32

TIME_STRIDE = 4
SPACE_STRIDE = 8
PATCH = 2  # latent places along a side of one of Wan's tokens


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Clip:
    """A target video with its poses and the condition video, on the host.

    `*B` is absent for one clip and the batch size after batching. Poses are
    OpenCV camera frames in metres relative to frame 0, one for each frame wanted;
    `frames` holds them all in training and frame 0 alone in generation (T = 1).
    `condition` is padded to a static length by repeating its last frame;
    `condition_length` counts the real ones, 0 where nothing was captured. `clip_id`
    seeds noise, so that a clip draws the same noise on every mesh. `first_from_view`
    are the poses of the condition's cameras, relative to the target's frame 0 as well
    and padded as it is; None where nobody asks for them.
    """

    frames: UInt8[np.ndarray, "*B T H W 3"]
    first_from_camera: Float32[np.ndarray, "*B N 4 4"]
    condition: UInt8[np.ndarray, "*B F H W 3"]
    condition_length: Int32[np.ndarray, "*B"]
    clip_id: UInt32[np.ndarray, "*B"]
    first_from_view: Float32[np.ndarray, "*B F 4 4"] | None = None

    def tree_flatten_with_keys(self):
        """Give the arrays in the order of the fields."""
        names = [field.name for field in dataclasses.fields(self)]
        keys = map(jax.tree_util.GetAttrKey, names)
        return [(key, getattr(self, key.name)) for key in keys], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        """Rebuild from any leaves: shapes and shardings are no arrays to check."""
        clip = object.__new__(cls)
        for field, leaf in zip(dataclasses.fields(cls), leaves, strict=True):
            object.__setattr__(clip, field.name, leaf)
        return clip


@nnx.dataclass
class Conditions(nnx.Pytree):
    """What the transformer is told besides the noisy latents, on the device.

    `first_frame` is Wan's mask (4 channels) then image latents, concatenated behind
    the noise. `geo_length` counts real latent frames of `geo_latents`. `keep_geo` and
    `keep_pose` are 1 or 0 for each clip: a dropped condition contributes nothing.
    `geo_poses` are the condition's own cameras, for branches that embed them. None
    means that the model has no such input.
    """

    text: Float[Array, "B S E"] = nnx.data()
    image: Float[Array, "B 257 I"] | None = nnx.data(default=None)
    first_frame: Float[Array, "B t h w Y"] | None = nnx.data(default=None)
    geo_latents: Float[Array, "B u h w C"] | None = nnx.data(default=None)
    geo_length: Int[Array, " B"] | None = nnx.data(default=None)
    keep_geo: Float[Array, " B"] | None = nnx.data(default=None)
    poses: Float[Array, "B T 4 4"] | None = nnx.data(default=None)
    keep_pose: Float[Array, " B"] | None = nnx.data(default=None)
    geo_poses: Float[Array, "B F 4 4"] | None = nnx.data(default=None)


def latent_frames(num_frames: int) -> int:
    """Count the latent frames of a video: 73 gives 19 (the paper prints 18)."""
    if num_frames < 1:
        raise ValueError(
            f"A video of {num_frames} frames has no latents; give 1 or more."
        )
    return 1 + (num_frames - 1) // TIME_STRIDE


def pixel_frames(num_latent_frames: int) -> int:
    """Count the frames that a latent video decodes to: 19 gives 73."""
    return 1 + (num_latent_frames - 1) * TIME_STRIDE


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Give latent (t, h, w) of a video; sides must divide into patches of 16 pixels."""
    side = SPACE_STRIDE * PATCH
    if height % side or width % side:
        raise ValueError(
            f"Video of {height}x{width}: both sides must be multiples of {side}, "
            f"such as {max(1, height // side) * side}x{max(1, width // side) * side}."
        )
    return latent_frames(num_frames), height // SPACE_STRIDE, width // SPACE_STRIDE


def token_grid(
    latents: tuple[int, int, int], patch: tuple[int, int] = (PATCH, PATCH)
) -> tuple[int, int, int]:
    """Give the token grid of a latent video: (19, 60, 104) gives (19, 30, 52).

    `patch` is the height and width of a token in latent places.
    """
    t, h, w = latents
    return t, h // patch[0], w // patch[1]
