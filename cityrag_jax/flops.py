"""Operations, bytes and parameters of the networks, by formula.

Counted: matrix products, convolutions and softmax attention, a multiply-add being two
operations. Not counted: norms, activations, rotary positions, softmax, residual sums
(under 1 % of the operations at full size). Zero padding of a convolution is counted as
if it were data. Bytes are each weight once and each operand and result of those
products once, at one item size: the least that an unfused program moves.

The I2V-14B forward at 29,640 tokens comes to 1.450 PFLOP; the often quoted 1.43 leaves
out the two softmaxes of the cross-attention.

Configs are read by attribute: `DiTConfig` and `VAEConfig` fit, nothing is imported.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from cityrag_jax.batch import TIME_STRIDE, latent_frames

IMAGE_TOKENS = 257
POSE_NUMBERS = 16


@runtime_checkable
class DiTSizes(Protocol):
    """What is read of a transformer's config."""

    dim: int
    num_layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    freq_dim: int
    text_dim: int
    text_len: int
    image_dim: int | None
    patch: tuple[int, int]


@runtime_checkable
class VAESizes(Protocol):
    """What is read of an autoencoder's config."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    patch: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a part takes: operations, bytes moved, numbers stored."""

    flops: int = 0
    bytes: int = 0
    parameters: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.parameters + other.parameters,
        )

    def __rmul__(self, times: int) -> "Cost":
        return Cost(times * self.flops, times * self.bytes, times * self.parameters)


def total(costs: Iterable[Cost] | Mapping[str, Cost]) -> Cost:
    """Add up costs, or the values of a table of parts."""
    costs = costs.values() if isinstance(costs, Mapping) else costs
    return sum(costs, start=Cost())


def linear(rows: int, width_in: int, width_out: int, itemsize: int = 2) -> Cost:
    """Cost of a linear layer with bias on `rows` vectors."""
    parameters = (width_in + 1) * width_out
    moved = rows * (width_in + width_out) + parameters
    return Cost(2 * rows * width_in * width_out, itemsize * moved, parameters)


def attention(queries: int, keys: int, width: int, itemsize: int = 2) -> Cost:
    """Cost of softmax attention over all heads, whose widths sum to `width`."""
    moved = 2 * (queries + keys) * width
    return Cost(4 * queries * keys * width, itemsize * moved)


def table(count: int, itemsize: int = 2) -> Cost:
    """Cost of `count` parameters that take part in no product: norms, modulation."""
    return Cost(0, itemsize * count, count)


def dit(
    config: DiTSizes, tokens: int, *, batch: int = 1, itemsize: int = 2
) -> dict[str, Cost]:
    """Cost of one forward of Wan without branches, part by part.

    `tokens` is the count for one clip. Weights are counted once for the whole batch.
    """
    D, layers = config.dim, config.num_layers
    rows, patch = batch * tokens, math.prod(config.patch)

    def dense(rows: int, width_in: int, width_out: int) -> Cost:
        return linear(rows, width_in, width_out, itemsize)

    text = batch * config.text_len
    parts = {
        "patch_embedding": dense(rows, patch * config.in_channels, D),
        "text_embedding": dense(text, config.text_dim, D) + dense(text, D, D),
        "time_embedding": dense(batch, config.freq_dim, D) + dense(batch, D, D),
        "time_projection": dense(batch, D, 6 * D),
    }
    if config.image_dim is not None:
        parts["image_embedding"] = _image_embedding(config, batch, itemsize)
    softmax = attention(tokens, tokens, D, itemsize)
    parts |= {
        "blocks.self_attention": layers
        * (_self_attention_weights(config, rows, itemsize) + _repeat(softmax, batch)),
        "blocks.cross_attention": layers
        * _cross_attention(config, tokens, batch, itemsize),
        "blocks.ffn": layers
        * (dense(rows, D, config.ffn_dim) + dense(rows, config.ffn_dim, D)),
        "blocks.cross_norm": layers * table(2 * D, itemsize),
        "blocks.modulation": layers * table(6 * D, itemsize),
        "head": dense(rows, D, patch * config.out_channels) + table(2 * D, itemsize),
    }
    return parts


def geo_branch(
    config: DiTSizes,
    tokens: int,
    condition_tokens: int,
    *,
    latent_channels: int = 16,
    batch: int = 1,
    itemsize: int = 2,
) -> dict[str, Cost]:
    """Cost that the geo attention adds to one forward, part by part.

    "patch_embedding" is spent once a clip; "keys_and_values" too, if they are cached.
    """
    D, layers = config.dim, config.num_layers
    rows, keys = batch * tokens, batch * condition_tokens
    pair = {n: 2 * linear(n, D, D, itemsize) + table(D, itemsize) for n in (rows, keys)}
    softmax = attention(tokens, condition_tokens, D, itemsize)
    patch = math.prod(config.patch) * latent_channels
    return {
        "patch_embedding": linear(keys, patch, D, itemsize),
        "key_norms": layers * table(2 * D, itemsize),
        "keys_and_values": layers * pair[keys],
        "queries_and_output": layers * pair[rows],
        "attention": layers * _repeat(softmax, batch),
    }


def pose_branch(
    config: DiTSizes,
    num_frames: int,
    tokens: int,
    *,
    hidden: int = 512,
    batch: int = 1,
    itemsize: int = 4,
) -> dict[str, Cost]:
    """Cost of the trajectory branch in float32: once a clip, then adding to `tokens`.

    Its vectors are laid onto the tokens by a product with who is in which frame.
    """
    frames = latent_frames(num_frames)
    rows = batch * frames
    grouped = TIME_STRIDE * POSE_NUMBERS
    moved = frames * tokens + (rows + batch * tokens) * config.dim
    spread = Cost(2 * rows * tokens * config.dim, itemsize * moved)
    return {
        "spread": config.num_layers * spread,
        "convolution": linear(rows, grouped, hidden, itemsize),
        "mlp": 2 * linear(rows, hidden, hidden, itemsize),
        "projections": config.num_layers * linear(rows, hidden, config.dim, itemsize),
    }


def vae_encode(
    config: VAESizes, num_frames: int, height: int, width: int, *, itemsize: int = 2
) -> dict[str, Cost]:
    """Cost of encoding one video, streamed in time; "quant_conv" is the 1x1x1 end."""
    patch, frames = config.patch, _whole_groups(config, num_frames)
    video = _Video(frames, height // patch, width // patch, itemsize)
    widths = [config.base_dim * m for m in config.dim_mult]
    encoder = [video.conv(27, 3 * patch**2, config.base_dim)]
    width_in = config.base_dim
    for level, width_out in enumerate(widths):
        for _ in range(config.num_res_blocks):
            encoder.append(_residual(video, width_in, width_out))
            width_in = width_out
        if level < len(config.temporal_downsample):
            larger, video = video, video.resized(0.5)
            encoder.append(video.conv(9, width_in, width_in, source=larger))
            if config.temporal_downsample[level]:
                larger, video = video, video.retimed((video.frames + 1) // 2)
                encoder.append(video.after_first().conv(3, width_in, width_in, larger))
    encoder.append(_middle(video, width_in))
    encoder.append(_head(video, width_in, 2 * config.z_dim))
    moments = 2 * config.z_dim
    return {"encoder": total(encoder), "quant_conv": video.conv(1, moments, moments)}


def vae_decode(
    config: VAESizes, num_frames: int, height: int, width: int, *, itemsize: int = 2
) -> dict[str, Cost]:
    """Cost of decoding one video of that size, streamed in time."""
    halvings = config.temporal_downsample
    frames = 1 + (num_frames - 1) // 2 ** sum(halvings)
    scale = config.patch * 2 ** len(halvings)
    video = _Video(frames, height // scale, width // scale, itemsize)
    post_quant = video.conv(1, config.z_dim, config.z_dim)
    widths = [config.base_dim * m for m in config.dim_mult[::-1]]
    width_in = widths[0]
    decoder = [video.conv(27, config.z_dim, width_in), _middle(video, width_in)]
    for level, width_out in enumerate(widths):
        for _ in range(config.num_res_blocks + 1):
            decoder.append(_residual(video, width_in, width_out))
            width_in = width_out
        if level < len(halvings):
            if halvings[::-1][level]:
                decoder.append(video.after_first().conv(3, width_in, 2 * width_in))
                video = video.retimed(2 * video.frames - 1)
            video = video.resized(2)
            decoder.append(video.conv(9, width_in, width_in // 2))
            width_in //= 2
    decoder.append(_head(video, width_in, 3 * config.patch**2))
    return {"decoder": total(decoder), "post_quant_conv": post_quant}


@dataclasses.dataclass(frozen=True)
class _Video:
    """A size of activations, to count layers that give it."""

    frames: int
    height: int
    width: int
    itemsize: int

    @property
    def places(self) -> int:
        return self.frames * self.height * self.width

    def resized(self, scale: float | int) -> "_Video":
        height, width = int(self.height * scale), int(self.width * scale)
        return dataclasses.replace(self, height=height, width=width)

    def retimed(self, frames: int) -> "_Video":
        return dataclasses.replace(self, frames=frames)

    def after_first(self) -> "_Video":
        """The frames that a time convolution makes: frame 0 passes untouched."""
        return self.retimed(self.frames - 1)

    def conv(
        self, taps: int, width_in: int, width_out: int, source: "_Video | None" = None
    ) -> Cost:
        """A convolution that gives this size; `source` is what it reads, if larger."""
        parameters = (taps * width_in + 1) * width_out
        read = (source or self).places * width_in
        moved = read + self.places * width_out + parameters
        flops = 2 * self.places * taps * width_in * width_out
        return Cost(flops, self.itemsize * moved, parameters)

    def norm(self, width: int) -> Cost:
        return table(width, self.itemsize)


def _residual(video: _Video, width_in: int, width_out: int) -> Cost:
    cost = video.norm(width_in) + video.conv(27, width_in, width_out)
    cost += video.norm(width_out) + video.conv(27, width_out, width_out)
    if width_in != width_out:
        cost += video.conv(1, width_in, width_out)
    return cost


def _middle(video: _Video, width: int) -> Cost:
    places = video.height * video.width
    softmax = attention(places, places, width, video.itemsize)
    mixing = video.norm(width) + video.conv(1, width, 3 * width)
    mixing += video.frames * softmax + video.conv(1, width, width)
    return 2 * _residual(video, width, width) + mixing


def _head(video: _Video, width: int, channels: int) -> Cost:
    return video.norm(width) + video.conv(27, width, channels)


def _whole_groups(config: VAESizes, num_frames: int) -> int:
    stride = 2 ** sum(config.temporal_downsample)
    return 1 + (num_frames - 1) // stride * stride


def _repeat(cost: Cost, batch: int) -> Cost:
    """Repeat what has no weights for every clip."""
    assert cost.parameters == 0
    return batch * cost


def _self_attention_weights(config: DiTSizes, rows: int, itemsize: int) -> Cost:
    """Projections q, k, v, o and the norms of q and k."""
    D = config.dim
    return 4 * linear(rows, D, D, itemsize) + table(2 * D, itemsize)


def _cross_attention(config: DiTSizes, tokens: int, batch: int, itemsize: int) -> Cost:
    """q and o of the tokens; k, v and a softmax for the text and for the image.

    A single row of text takes all the weight: only its v and o are computed.
    """
    D, text = config.dim, config.text_len
    cost = 2 * linear(batch * text, D, D, itemsize) + table(2 * D, itemsize)
    if text == 1 and config.image_dim is None:
        return cost + Cost(parameters=2 * (D + 1) * D)
    cost += 2 * linear(batch * tokens, D, D, itemsize)
    cost += _repeat(attention(tokens, text, D, itemsize), batch)
    if config.image_dim is not None:
        cost += 2 * linear(batch * IMAGE_TOKENS, D, D, itemsize) + table(D, itemsize)
        cost += _repeat(attention(tokens, IMAGE_TOKENS, D, itemsize), batch)
    return cost


def _image_embedding(config: DiTSizes, batch: int, itemsize: int) -> Cost:
    """Norm, two linears, norm."""
    width, rows = config.image_dim, batch * IMAGE_TOKENS
    cost = linear(rows, width, width, itemsize) + linear(
        rows, width, config.dim, itemsize
    )
    return cost + table(2 * width + 2 * config.dim, itemsize)
