"""From a clip on the host to latents and Conditions: one way for training and sampling.

Pictures are uint8 on the host and [-1, 1] for every network. Source of the first-frame
conditioning and the resampling: Wan-Video/Wan2.1, wan/image2video.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from cityrag_jax.batch import (
    PATCH,
    SPACE_STRIDE,
    TIME_STRIDE,
    Clip,
    Conditions,
    latent_frames,
)
from cityrag_jax.model.clip_vision import CLIPVision
from cityrag_jax.model.umt5 import UMT5Encoder
from cityrag_jax.model.vae import WanVAE
from cityrag_jax.parallel import axis_size, spread_places, spread_rows

CUBIC = -0.75  # the reference's kernel; Catmull-Rom would be -0.5
CLIP_SIZE = 224
# Mean and deviation of the pictures that CLIP was trained on (openai/CLIP).
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def to_unit(frames: UInt8[Array | np.ndarray, "..."]) -> Float32[Array, "..."]:
    """Bring 8-bit pixels to [-1, 1]."""
    return jnp.asarray(frames).astype(jnp.float32) / 127.5 - 1


def to_pixels(video: Float[Array | np.ndarray, "..."]) -> UInt8[Array, "..."]:
    """Bring [-1, 1] to 8-bit pixels, clamped and rounded."""
    return jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def resize_bicubic(
    image: Float[Array | np.ndarray, "h w 3"], size: tuple[int, int]
) -> Float32[Array, "H W 3"]:
    """Resample to `size` (H, W) as the reference does: a = -0.75, no antialiasing.

    Half-pixel centres, edges clamped; `jax.image.resize` differs in all of it.
    """
    rows = cubic_weights(image.shape[0], size[0])
    columns = cubic_weights(image.shape[1], size[1])
    image = jnp.asarray(image, jnp.float32)
    return jnp.einsum("Hh,hwc,Ww->HWc", rows, image, columns, precision="highest")


def cubic_weights(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """Make the matrix that resamples one axis.

    Places are rounded as torch rounds them, a float32 scale and one fused
    multiply-add: at sharp edges the pixels would differ by 1e-5.
    """
    scale = float(np.float32(source) / np.float32(target))
    position = ((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32)
    start = np.floor(position).astype(int)
    weights = np.zeros((target, source), np.float32)
    for tap in range(-1, 3):
        at = np.clip(start + tap, 0, source - 1)
        np.add.at(weights, (np.arange(target), at), _cubic(position - start - tap))
    return weights


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def clip_pixels(
    image: Float[Array | np.ndarray, "h w 3"],
) -> Float32[Array, "224 224 3"]:
    """Prepare a picture in [-1, 1] for CLIP: squashed to a square and normalised.

    The picture as it was given, not resized to the video. Bicubic overshoot stays.
    """
    image = resize_bicubic(image, (CLIP_SIZE, CLIP_SIZE)) * 0.5 + 0.5
    return (image - CLIP_MEAN[None, None]) / CLIP_STD[None, None]


def first_frame_conditioning(
    vae: WanVAE, image: Float[Array, "H W 3"], num_frames: int
) -> Float32[Array, "t h w Y"]:
    """Make Wan's image-to-video channels: mask (4), then the latents of the image.

    The image is frame 0 of a video whose other frames are grey pixels, encoded as one.
    """
    return first_frames_conditioning(vae, image[None], num_frames)[0]


def first_frames_conditioning(
    vae: WanVAE, images: Float[Array, "B H W 3"], num_frames: int
) -> Float32[Array, "B t h w Y"]:
    """Make the conditioning channels of a batch of first images in [-1, 1]."""
    latents = vae.encode_before_grey(images, num_frames)
    # Frame 0 fills its group of four alone, so all four channels mark latent frame 0.
    mask = jnp.zeros((*latents.shape[:-1], TIME_STRIDE)).at[:, 0].set(1)
    return jnp.concatenate([mask, latents], axis=-1)


def fit_pixel_budget(height: int, width: int, area: int) -> tuple[int, int]:
    """Give the video's (H, W) for a picture, as the official code fits an area.

    Whole patches of 16 pixels, rounded down from the picture's own shape. Roots come
    out just below whole numbers: 480x832 under 480 * 832 pixels gives 464x832.
    """
    side = SPACE_STRIDE * PATCH
    ratio = height / width
    rows, columns = np.sqrt(area * ratio), np.sqrt(area / ratio)
    return int(rows // side) * side, int(columns // side) * side


def encode_text(
    encoder: UMT5Encoder,
    ids: Int[Array | np.ndarray, "B S"],
    mask: Int[Array | np.ndarray, "B S"],
) -> Float32[Array, "B S E"]:
    """Encode prompts as the transformer takes them: zeros behind the true length."""
    real = jnp.asarray(mask) != 0
    return jnp.where(real[..., None], encoder(ids, mask), 0)


def image_to_video_conditions(
    vae: WanVAE,
    clip_vision: CLIPVision,
    image: Float[Array | np.ndarray, "h w 3"],
    text: Float[Array | np.ndarray, "S E"],
    size: tuple[int, int],
    num_frames: int,
) -> Conditions:
    """Make what official image-to-video tells the transformer of one picture.

    `image` in [-1, 1] is of any size: the video's frame 0 is it resized to `size`
    (H, W), CLIP sees it as it is. `text` holds the prompt's rows, at most 512.
    """
    frame = resize_bicubic(image, size)
    return Conditions(
        text=jnp.asarray(text)[None],
        image=clip_vision(clip_pixels(image)[None]),
        first_frame=first_frames_conditioning(vae, frame[None], num_frames),
    )


def encode_videos(
    vae: WanVAE, *videos: UInt8[Array | np.ndarray, "B _ H W 3"]
) -> tuple[Float32[Array, "B _ h w z"], ...]:
    """Encode videos of the same clips, spread over all devices.

    For that the shorter are padded: latents do not see what comes behind them.
    """
    longest = max(video.shape[1] for video in videos)

    def pad(video):
        behind = longest - video.shape[1]
        return jnp.pad(video, ((0, 0), (0, behind), (0, 0), (0, 0), (0, 0)))

    if axis_size("sequence") == 1:
        return tuple(vae.encode(to_unit(video)) for video in videos)
    padded = map(pad, videos)

    def encode(rows):
        return vae.encode(to_unit(rows))

    if len(videos) == 1:
        return (spread_places(encode, *padded, vae.config.space_stride),)
    made = spread_rows(encode, *padded)
    return tuple(
        latents[:, : latent_frames(video.shape[1])]
        for latents, video in zip(made, videos, strict=True)
    )


def encode_conditions(
    vae: WanVAE,
    clip: Clip,
    text: Float[Array | np.ndarray, "S E"],
    clip_vision: CLIPVision | None = None,
    geo_latents: Float[Array, "B s h w z"] | None = None,
) -> Conditions:
    """Make what the transformer is told of a batch of clips, nothing dropped.

    `text` is the fixed prompt's rows; `clip_vision` sees the first images if the
    transformer takes image features. The condition video is encoded padded, unless
    `geo_latents` are given: those of n real frames count 1 + (n - 1) // 4.
    """
    if geo_latents is None:
        (geo_latents,) = encode_videos(vae, clip.condition)
    return _conditions(vae, clip, text, clip_vision, geo_latents)


def encode_clips(
    vae: WanVAE,
    clip: Clip,
    text: Float[Array | np.ndarray, "S E"],
    clip_vision: CLIPVision | None = None,
) -> tuple[Float32[Array, "B t h w z"], Conditions]:
    """Encode the target videos, too: give their latents and the conditions."""
    latents, geo_latents = encode_videos(vae, clip.frames, clip.condition)
    return latents, _conditions(vae, clip, text, clip_vision, geo_latents)


def _conditions(vae, clip, text, clip_vision, geo_latents):
    batch, num_frames = clip.first_from_camera.shape[:2]
    images = clip.frames[:, 0]
    length, views = jnp.asarray(clip.condition_length), clip.first_from_view

    def condition(images):
        return first_frames_conditioning(vae, to_unit(images), num_frames)

    def features(images):
        return clip_vision(jax.vmap(clip_pixels)(to_unit(images)))

    return Conditions(
        text=jnp.broadcast_to(jnp.asarray(text)[None], (batch, *text.shape)),
        image=clip_vision and spread_rows(features, images)[0],
        first_frame=spread_rows(condition, images)[0],
        geo_latents=geo_latents,
        # A length of 0 says that there is none; it must not reach the kernel.
        geo_length=1 + jnp.maximum(length - 1, 0) // TIME_STRIDE,
        keep_geo=(length > 0).astype(jnp.float32),
        poses=jnp.asarray(clip.first_from_camera),
        keep_pose=jnp.ones(batch),
        geo_poses=None if views is None else jnp.asarray(views),
    )
