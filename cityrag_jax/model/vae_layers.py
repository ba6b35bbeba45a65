"""The layers of the Wan 2.1 video autoencoder.

A layer takes a chunk of frames and its cache, and gives both: `cache=None` starts a
video, whose first frame is special, and the cache that it returned continues it.

Source: Wan-Video/Wan2.1, `wan/modules/vae.py`.
"""

import math
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from cityrag_jax.model.layers import precision_of

Frames = Float[Array, "B T H W C"]
# Frames of another count, size or width.
NewFrames = Float[Array, "B t h w c"]
# What a layer remembers of earlier chunks: arrays, or () where it is stateless.
Cache = PyTree[Array]


@runtime_checkable
class Types(Protocol):
    """What a layer reads of the autoencoder's config."""

    dtype: DTypeLike
    param_dtype: DTypeLike


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x projected where widths differ."""

    def __init__(self, width_in: int, width: int, config: Types, *, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(width_in, config)
        self.conv1 = CausalConv(width_in, width, config, rngs=rngs)
        self.norm2 = ChannelNorm(width, config)
        self.conv2 = CausalConv(width, width, config, rngs=rngs)
        projected = width_in != width
        self.shortcut = Conv(width_in, width, config, rngs=rngs) if projected else None

    def __call__(self, x: Frames, cache: Cache = None) -> tuple[NewFrames, Cache]:
        cache1, cache2 = (None, None) if cache is None else cache
        residual = x if self.shortcut is None else self.shortcut(x)
        x, cache1 = self.conv1(nnx.silu(self.norm1(x)), cache1)
        x, cache2 = self.conv2(nnx.silu(self.norm2(x)), cache2)
        return residual + x, (cache1, cache2)


class AttentionBlock(nnx.Module):
    """Single-head attention among the places of each frame, with a residual.

    Needs (h w)^2 numbers for each frame of the chunk: one frame when streamed.
    """

    def __init__(self, width: int, config: Types, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(width, config)
        self.to_qkv = Conv(width, 3 * width, config, rngs=rngs)
        self.proj = Conv(width, width, config, rngs=rngs, zero=True)

    def __call__(self, x: Frames, cache: Cache = None) -> tuple[Frames, Cache]:
        B, _, H, _, C = x.shape
        qkv = rearrange(self.to_qkv(self.norm(x)), "B T H W C -> (B T) (H W) C")
        q, k, v = jnp.split(qkv, 3, axis=-1)
        einsum = partial(jnp.einsum, precision=precision_of(q.dtype))
        scores = einsum("nqc,nkc->nqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * C**-0.5, axis=-1).astype(v.dtype)
        out = einsum("nqk,nkc->nqc", weights, v)
        out = rearrange(out, "(B T) (H W) C -> B T H W C", B=B, H=H)
        return x + self.proj(out), ()


class Downsample(nnx.Module):
    """Halve height and width, then time if `temporal`.

    The first frame of a video passes time untouched: 1 + 2m frames become 1 + m.
    """

    def __init__(self, width: int, temporal: bool, config: Types, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width, config, size=(1, 3, 3), rngs=rngs)
        size = (3, 1, 1)
        self.time_conv = (
            Conv(width, width, config, size=size, rngs=rngs) if temporal else None
        )

    def __call__(self, x: Frames, cache: Cache = None) -> tuple[NewFrames, Cache]:
        # The reference pads one row below and one column on the right, and only there.
        x = self.conv(x, stride=(1, 2), padding=(0, 1))
        if self.time_conv is None:
            return x, ()
        last = x[:, -1:]
        if cache is not None:
            frames = jnp.concatenate([cache, x], axis=1)
            return self.time_conv(frames, stride=(2, 1)), last
        if x.shape[1] == 1:
            return x, last
        halved = self.time_conv(x, stride=(2, 1))
        return jnp.concatenate([x[:, :1], halved], axis=1), last


class Upsample(nnx.Module):
    """Double time if `temporal`, then height and width; channels are halved.

    The first frame of a video passes time undoubled, and the time convolution never
    sees it: it starts on the second frame, behind zeros.
    """

    def __init__(self, width: int, temporal: bool, config: Types, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width // 2, config, size=(1, 3, 3), rngs=rngs)
        size = (3, 1, 1)
        self.time_conv = (
            CausalConv(width, 2 * width, config, size=size, rngs=rngs)
            if temporal
            else None
        )

    def __call__(self, x: Frames, cache: Cache = None) -> tuple[NewFrames, Cache]:
        cache = () if self.time_conv is None else cache
        if self.time_conv is not None:
            x, cache = self._double_time(x, cache)
        x = repeat(x, "B T H W C -> B T (H y) (W x) C", y=2, x=2)
        return self.conv(x, padding=(1, 1)), cache

    def _double_time(self, x, cache):
        if cache is None:
            first, x = x[:, :1], x[:, 1:]
            cache = jnp.zeros_like(first, shape=(first.shape[0], 2, *first.shape[2:]))
            if x.shape[1] == 0:
                return first, cache
            doubled, cache = self._double_time(x, cache)
            return jnp.concatenate([first, doubled], axis=1), cache
        x, cache = self.time_conv(x, cache)
        return rearrange(x, "B T H W (s C) -> B (T s) H W C", s=2), cache


class ChannelNorm(nnx.Module):
    """Divide by the length over channels, times sqrt(C) and a learned scale."""

    def __init__(self, width: int, config: Types):
        scale = jnp.ones((width,), config.param_dtype)
        self.scale = nnx.Param(scale, axes=(None,))

    def __call__(self, x: Frames) -> Frames:
        # Statistics are float32. The length is clamped at 1e-12 as in the reference,
        # by its square: a root of zero would have no gradient.
        x32 = x.astype(jnp.float32)
        square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)[None, None, None, None]
        unit = x32 * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return (unit * (x.shape[-1] ** 0.5) * scale).astype(x.dtype)


class Conv(nnx.Module):
    """A convolution over time, rows and columns as one 2-D convolution.

    The time taps are concatenated in channels, which is faster than a 3-D convolution
    on every device that we measured. Time is never padded here.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        config: Types,
        *,
        size: tuple[int, int, int] = (1, 1, 1),
        zero: bool = False,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_uniform()
        # Drawn as a matrix: XLA takes seconds to compile a draw of five dimensions.
        taps = math.prod(size) * width_in
        kernel = init(rngs.params(), (taps, width), config.param_dtype)
        kernel = kernel.reshape(*size, width_in, width)
        bias = jnp.zeros((width,), config.param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, None, "vae_out"))
        self.bias = nnx.Param(bias, axes=("vae_out",))
        self.dtype = config.dtype

    def __call__(
        self,
        x: Frames,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> NewFrames:
        """Convolve with a stride in time and in space, padding each side of space."""
        taps, *_ = self.kernel.shape
        kernel = rearrange(self.kernel[...], "t y x i o -> y x (t i) o")
        B = x.shape[0]
        frames = rearrange(_time_taps(x, taps, stride[0]), "B T H W C -> (B T) H W C")
        frames = jax.lax.conv_general_dilated(
            frames,
            kernel.astype(self.dtype),
            window_strides=(stride[1], stride[1]),
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision_of(self.dtype),
        )
        frames = rearrange(frames, "(B T) H W C -> B T H W C", B=B)
        return frames + self.bias[...].astype(self.dtype)[None, None, None, None]


class CausalConv(Conv):
    """A convolution that sees the present and the past; before the video, zeros.

    The cache is the last two input frames.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        config: Types,
        *,
        size: tuple[int, int, int] = (3, 3, 3),
        rngs: nnx.Rngs,
    ):
        super().__init__(width_in, width, config, size=size, rngs=rngs)

    def __call__(self, x: Frames, cache: Cache = None) -> tuple[NewFrames, Cache]:
        taps, rows, _, *_ = self.kernel.shape
        if cache is None:
            B, _, *rest = x.shape
            cache = jnp.zeros((B, taps - 1, *rest), x.dtype)
        frames = jnp.concatenate([cache, x], axis=1)
        side = (rows // 2, rows // 2)
        return super().__call__(frames, padding=side), frames[:, 1 - taps :]


def _time_taps(x, taps, stride):
    """Concatenate in channels the frames that each result sees, earliest first."""
    if taps == 1:
        return x[:, ::stride]
    count = (x.shape[1] - taps) // stride + 1
    reach = (count - 1) * stride + 1
    return jnp.concatenate([x[:, j : j + reach : stride] for j in range(taps)], axis=-1)
