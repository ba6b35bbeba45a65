"""The Wan 2.1 video autoencoder, causal in time, channels last.

A video of 1 + 4m frames becomes 1 + m latent frames, each 8x smaller in height and
width. Every layer is causal, so the video may be fed in chunks: a layer called with
`cache=None` starts a video (its first frame is special), called with the cache that
it returned it continues one. The whole-sequence form is a single first chunk as long
as the video; the streamed form is a first chunk of one latent frame, then a scan over
groups of one latent frame each, whose memory does not grow with the video.

Source: Wan-Video/Wan2.1, `wan/modules/vae.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cityrag_jax.model.vae_layers import (
    AttentionBlock,
    Cache,
    CausalConv,
    ChannelNorm,
    Conv,
    Downsample,
    Frames,
    NewFrames,
    ResidualBlock,
    Upsample,
)

# Statistics of the latents of Wan's own autoencoder.
WAN_LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are Wan 2.1's.

    `temporal_downsample` says for each spatial halving whether time is halved too.
    `patch` pixels a side are channels of one place before the first convolution, as in
    Wan 2.2: no layer runs at the picture's own size.
    `dtype` is the type of the arithmetic (norm statistics and latents stay float32).
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries for "
                f"{len(self.dim_mult)} levels; give one for each of the "
                f"{len(self.dim_mult) - 1} steps between levels."
            )
        if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
            raise ValueError(
                f"latent_mean and latent_std have {len(self.latent_mean)} and "
                f"{len(self.latent_std)} entries for z_dim {self.z_dim}; give one for "
                "each latent channel (0 and 1 before they are measured)."
            )

    @property
    def time_stride(self) -> int:
        """Frames for each latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_stride(self) -> int:
        """Pixels for each latent row and column."""
        return self.patch * 2 ** len(self.temporal_downsample)


class Statistics(nnx.Variable):
    """Mean and deviation of latents as an array, which is no weight."""


class WanVAE(nnx.Module):
    """Encode video to normalised latents and back.

    `statistics` are those of the config, None until `hold_statistics`.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(2 * config.z_dim, 2 * config.z_dim, config, rngs=rngs)
        self.post_quant_conv = Conv(config.z_dim, config.z_dim, config, rngs=rngs)
        self.statistics: Statistics | None = nnx.data(None)

    def hold_statistics(self, place: Sharding, *, abstract: bool = False) -> None:
        """Hold the latents' statistics as an array, an argument of programs.

        As constants they would give each autoencoder programs of its own, that are
        compiled anew: a minute on a GPU.
        """
        rows = np.array([self.config.latent_mean, self.config.latent_std], np.float32)
        if abstract:
            held = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=place)
        else:
            held = jax.device_put(rows, place)
        self.statistics = Statistics(held)

    def encode(self, video: Float[Array, "B T H W 3"]) -> Float32[Array, "B t h w z"]:
        """Encode video in [-1, 1] to the normalised mean, streamed in time.

        Trailing frames that do not fill a group of `time_stride` are ignored. Height
        and width must be multiples of `space_stride`, else ValueError.
        """
        groups = self._count_groups(*video.shape[1:4])
        stride = self.config.time_stride

        def encode_group(index, caches):
            start = 1 + stride * index
            group = jax.lax.dynamic_slice_in_dim(video, start, stride, axis=1)
            moments, caches = self.encoder(group.astype(self.config.dtype), caches)
            return self.normalise(self._split_moments(moments)[0]), caches

        moments, caches = self.encoder(video[:, :1].astype(self.config.dtype), None)
        first = self.normalise(self._split_moments(moments)[0])
        return _stream(encode_group, first, caches, groups)

    def encode_before_grey(
        self, images: Float[Array, "B H W 3"], num_frames: int
    ) -> Float32[Array, "B t h w z"]:
        """Equal `encode` of videos of an image and then grey, 0 in [-1, 1].

        Every layer sees a few frames back. Behind these its results for grey stay the
        same and are repeated, layers of one frame rate together: of 73 frames those at
        the full rate, three quarters of the work, run over 25. The last ones see back
        further than 81 frames, so that all latents differ.
        """
        groups = self._count_groups(num_frames, *images.shape[1:3])
        if not groups:
            return self.encode(images[:, None])
        first = images[:, None].astype(self.config.dtype)
        grey = jnp.zeros_like(first).repeat(self.config.time_stride, axis=1)[None]
        for layers in self.encoder.rates():
            first, grey = _run_until_still(layers, first, grey, groups)
        grey = grey[jnp.minimum(jnp.arange(groups), len(grey) - 1)]
        moments = jnp.concatenate([first[None], grey])
        moments = rearrange(moments, "n B T h w C -> B (n T) h w C")
        return self.normalise(self._split_moments(moments)[0])

    def decode(self, latents: Float[Array, "B t h w z"]) -> Float32[Array, "B T H W 3"]:
        """Decode normalised latents, streamed in time; the video is not clamped."""

        def decode_group(index, caches):
            group = jax.lax.dynamic_slice_in_dim(latents, 1 + index, 1, axis=1)
            return self._decode_chunk(self.denormalise(group), caches)

        first, caches = self._decode_chunk(self.denormalise(latents[:, :1]), None)
        return _stream(decode_group, first, caches, latents.shape[1] - 1)

    def encode_whole(
        self, video: Float[Array, "B T H W 3"]
    ) -> Float32[Array, "B t h w z"]:
        """Equal `encode`, in one pass whose memory grows with the video."""
        return self.normalise(self.posterior(video)[0])

    def decode_whole(
        self, latents: Float[Array, "B t h w z"]
    ) -> Float32[Array, "B T H W 3"]:
        """Equal `decode`, in one pass whose memory grows with the video."""
        return self.decode_raw(self.denormalise(latents))

    def posterior(
        self, video: Float[Array, "B T H W 3"]
    ) -> tuple[Float32[Array, "B t h w z"], Float32[Array, "B t h w z"]]:
        """Give mean and log variance of the latents, not normalised, in one pass."""
        groups = self._count_groups(*video.shape[1:4])
        video = video[:, : 1 + groups * self.config.time_stride]
        return self._split_moments(self.encoder(video.astype(self.config.dtype))[0])

    def decode_raw(
        self, latents: Float[Array, "B t h w z"]
    ) -> Float32[Array, "B T H W 3"]:
        """Decode latents that are not normalised, in one pass."""
        return self._decode_chunk(latents, None)[0]

    def normalise(
        self, latents: Float[Array, "B t h w z"]
    ) -> Float32[Array, "B t h w z"]:
        """Bring each latent channel to mean 0 and standard deviation 1."""
        mean, std = self._latent_statistics()
        return (latents.astype(jnp.float32) - mean) / std

    def denormalise(
        self, latents: Float[Array, "B t h w z"]
    ) -> Float32[Array, "B t h w z"]:
        """Undo `normalise`."""
        mean, std = self._latent_statistics()
        return latents.astype(jnp.float32) * std + mean

    def _latent_statistics(self):
        if self.statistics is None:
            rows = self.config.latent_mean, self.config.latent_std
        else:
            rows = self.statistics.get_value()
        return [jnp.asarray(row, jnp.float32)[None, None, None, None] for row in rows]

    def _count_groups(self, T, H, W):
        """Count the groups of frames after the first frame, refusing odd sizes."""
        side = self.config.space_stride
        if T < 1 or H % side or W % side:
            raise ValueError(
                f"Video of {T} frames of {H}x{W}: the autoencoder needs one frame or "
                f"more and sides that are multiples of {side}; resize or crop it first."
            )
        return (T - 1) // self.config.time_stride

    def _split_moments(self, moments):
        moments = self.quant_conv(moments).astype(jnp.float32)
        return tuple(jnp.split(moments, 2, axis=-1))

    def _decode_chunk(self, latents, caches):
        x = self.post_quant_conv(latents.astype(self.config.dtype))
        video, caches = self.decoder(x, caches)
        return video.astype(jnp.float32), caches


def _stream(step, first, caches, groups):
    """Write `first` and then every group's result into one array, in a scan.

    The result is carried and updated in place: stacking it instead would need a second
    array of its size to bring time behind the batch.
    """
    if not groups:
        return first

    def body(carry, index):
        result, caches = carry
        frames, caches = step(index, caches)
        start = 1 + index * frames.shape[1]
        result = jax.lax.dynamic_update_slice_in_dim(result, frames, start, axis=1)
        return (result, caches), None

    size = jax.eval_shape(step, jnp.int32(0), caches)[0].shape[1]
    B, _, *rest = first.shape
    result = jnp.zeros((B, 1 + groups * size, *rest), first.dtype)
    result = jax.lax.dynamic_update_slice_in_dim(result, first, 0, axis=1)
    (result, _), _ = jax.lax.scan(body, (result, caches), jnp.arange(groups))
    return result


class Encoder(nnx.Module):
    """Video to the moments of the latents, before the last 1x1x1 convolution.

    `layers` is flat, numbered as in the official checkpoint.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.patch = config.patch
        self.conv_in = CausalConv(3 * self.patch**2, widths[0], config, rngs=rngs)
        layers = []
        for level, (width_in, width) in enumerate(
            zip(widths[:-1], widths[1:], strict=True)
        ):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(width_in, width, config, rngs=rngs))
                width_in = width
            if level < len(config.temporal_downsample):
                temporal = config.temporal_downsample[level]
                layers.append(Downsample(width, temporal, config, rngs=rngs))
        self.layers = nnx.List(layers)
        self.middle = _middle(width, config, rngs)
        self.norm_out = ChannelNorm(width, config)
        self.conv_out = CausalConv(width, 2 * config.z_dim, config, rngs=rngs)

    def __call__(self, x: Frames, caches: Cache = None) -> tuple[NewFrames, Cache]:
        return _run([layer for part in self.rates() for layer in part], x, caches)

    def rates(self) -> list[list[Callable[..., tuple[NewFrames, Cache]]]]:
        """Give the layers in order, in parts of one frame rate."""
        parts = [[self._patches, self.conv_in]]
        for layer in self.layers:
            parts[-1].append(layer)
            if isinstance(layer, Downsample) and layer.time_conv is not None:
                parts.append([])
        parts[-1] += [*self.middle, self._head]
        return parts

    def _patches(self, x, cache):
        p = self.patch
        return rearrange(x, "B T (H y) (W x) C -> B T H W (C x y)", y=p, x=p), ()

    def _head(self, x, cache):
        return self.conv_out(nnx.silu(self.norm_out(x)), cache)


class Decoder(nnx.Module):
    """Latents after the first 1x1x1 convolution to video; the encoder's mirror."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        multiples = config.dim_mult[::-1]
        widths = [config.base_dim * m for m in multiples]
        width_in = widths[0]
        self.conv_in = CausalConv(config.z_dim, width_in, config, rngs=rngs)
        self.middle = _middle(width_in, config, rngs)
        layers = []
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(width_in, width, config, rngs=rngs))
                width_in = width
            if level < len(config.temporal_downsample):
                temporal = config.temporal_downsample[::-1][level]
                layers.append(Upsample(width, temporal, config, rngs=rngs))
                width_in = width // 2
        self.layers = nnx.List(layers)
        self.norm_out = ChannelNorm(width, config)
        self.patch = config.patch
        self.conv_out = CausalConv(width, 3 * self.patch**2, config, rngs=rngs)

    def __call__(self, x: Frames, caches: Cache = None) -> tuple[NewFrames, Cache]:
        layers = [self.conv_in, *self.middle, *self.layers, self._head, self._pixels]
        return _run(layers, x, caches)

    def _head(self, x, cache):
        return self.conv_out(nnx.silu(self.norm_out(x)), cache)

    def _pixels(self, x, cache):
        p = self.patch
        return rearrange(x, "B T H W (C x y) -> B T (H y) (W x) C", y=p, x=p), ()


def _middle(width, config, rngs):
    return nnx.List(
        [
            ResidualBlock(width, width, config, rngs=rngs),
            AttentionBlock(width, config, rngs=rngs),
            ResidualBlock(width, width, config, rngs=rngs),
        ]
    )


def _run(layers, x, caches):
    """Apply layers in order, each with its cache; None starts a video everywhere."""
    caches = [None] * len(layers) if caches is None else caches
    new_caches = []
    for layer, cache in zip(layers, caches, strict=True):
        x, cache = layer(x, cache)
        new_caches.append(cache)
    return x, tuple(new_caches)


def _run_until_still(layers, first, groups, count):
    """Apply layers to a frame, then to groups of frames of which the last stays.

    Gives the same: a frame, and at most `count` groups up to the first that stays. A
    layer's cache is all that it sees of earlier frames, so that a group sees as many
    frames back as all caches hold together.
    """
    first, caches = _run(layers, first, None)
    seen = sum(cache.shape[1] for cache in jax.tree.leaves(caches))
    last = len(groups) - 1
    count = min(count, len(groups) + math.ceil(seen / groups.shape[2]))

    def body(caches, index):
        x, caches = _run(layers, groups[jnp.minimum(index, last)], caches)
        return caches, x

    return first, jax.lax.scan(body, caches, jnp.arange(count))[1]
