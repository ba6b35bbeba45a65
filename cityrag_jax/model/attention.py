"""Softmax attention: one fused kernel for each platform, and Wan's two attentions.

Kernels: cuDNN on NVIDIA GPUs, splash on TPUs, plain float32 softmax elsewhere. Keys
beyond a clip's length are left out by lengths, never by a mask array.

A kernel's backward pass needs the kernel's own result and log-sum-exp. Both carry the
name that `attend` is given, so that rematerialisation can keep them and need not run
the forward kernel again.

Source of the layers: Wan-Video/Wan2.1, wan/modules/model.py.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cityrag_jax import parallel
from cityrag_jax.model.layers import Linear, RMSNorm, precision_of, rotate

SPLASH_BLOCK = 1024


def attend(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    kv_length: Int[Array, " B"] | None = None,
    *,
    scale: float | None = None,
    name: str | None = None,
) -> Float[Array, "B L N K"]:
    """softmax(scale q k^T) v over the first `kv_length` (at least 1) keys.

    `scale` is 1 / sqrt(K) if it is not given, or 1 where `q` has it in it already.
    `name` is what rematerialisation knows a fused kernel's residuals by.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if parallel.platform() == "gpu" and half:
        return _cudnn(q, k, v, kv_length, scale, name)
    if parallel.platform() == "tpu":
        return _splash(q, k, v, kv_length, scale, name)
    return _plain(q, k, v, kv_length, scale)


def _plain(q, k, v, kv_length, scale):
    einsum = partial(jnp.einsum, precision=precision_of(q.dtype))
    logits = einsum("BLNK,BSNK->BNLS", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale
    if kv_length is not None:
        real = jnp.arange(k.shape[1])[None, :] < kv_length[:, None]
        logits = jnp.where(real[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return einsum("BNLS,BSNK->BLNK", weights, v)


def _cudnn(q, k, v, kv_length, scale, name=None):
    """Make both counts even, as cuDNN's backward pass wants them (257 image rows)."""
    queries, keys = q.shape[1], k.shape[1]
    if keys % 2:
        kv_length = (
            jnp.full(len(k), keys, jnp.int32) if kv_length is None else kv_length
        )
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v)
    )

    def kernel(q: Array, k: Array, v: Array, kv_length: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            key_value_seq_lengths=kv_length,
            implementation="cudnn",
        )

    kernel = kernel if name is None else _name_residuals(kernel, name)
    return kernel(q, k, v, kv_length)[:, :queries]


def _name_residuals(kernel: Callable[..., Array], name: str) -> Callable[..., Array]:
    """Name what a kernel's own derivative rule keeps beside q, k and v.

    A name put on the result from outside comes too late: the rule has kept its own,
    nameless one.
    """

    @jax.custom_vjp
    def named(q, k, v, kv_length):
        return kernel(q, k, v, kv_length)

    def forward(q, k, v, kv_length):
        out, pull_back = jax.vjp(lambda *qkv: kernel(*qkv, kv_length), q, k, v)
        kept, structure = jax.tree.flatten(pull_back)
        # By identity: the result is among them and must be one array, named once.
        given = {id(x) for x in (q, k, v)}
        own = {
            id(x): checkpoint_name(x, name)
            for x in (out, *kept)
            if id(x) not in given and x.size and jnp.issubdtype(x.dtype, jnp.floating)
        }
        kept = [own.get(id(x), x) for x in kept]
        return own[id(out)], structure.unflatten(kept)

    def backward(pull_back, cotangent):
        return *pull_back(cotangent), None

    named.defvjp(forward, backward)
    return named


def _splash(q, k, v, kv_length, scale, name=None):
    """Pad queries and keys to whole blocks; segment ids keep the padding out.

    The backward pass is one kernel instead of two, for which it keeps a dq for each
    block of keys: 1.1 GiB for five heads and 32,768 keys.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    padded_q, padded_k = (-(-n // SPLASH_BLOCK) * SPLASH_BLOCK for n in (queries, keys))

    def pad(x: Array, length: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        return rearrange(x, "B L N K -> B N L K")

    real = jnp.full(batch, keys) if kv_length is None else kv_length
    segments = splash.SegmentIds(
        q=jnp.ones((batch, padded_q), jnp.int32),
        kv=(jnp.arange(padded_k)[None, :] < real[:, None]).astype(jnp.int32),
    )
    block = SPLASH_BLOCK
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((padded_q, padded_k))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block // 2,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block // 2,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
    )
    out = jax.vmap(kernel)(
        pad(q if scale == 1 else q * scale, padded_q),
        pad(k, padded_k),
        pad(v, padded_k),
        segments,
    )
    return rearrange(out[:, :, :queries], "B N L K -> B L N K")


@partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["whole"]
)
@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values of a source, heads apart; all the queries of a clip may use them.

    On a mesh, `whole` says that each device has all tokens of some heads already, else
    some tokens of all heads.
    """

    k: Float[Array, "*layers B S N K"] | None
    v: Float[Array, "*layers B S N K"]
    whole: bool = False

    def gathered(self) -> "Keys":
        """Exchange tokens for heads, once for all that will look at them."""
        return Keys(*map(parallel.split_heads, (self.k, self.v)), whole=True)


class Attention(nnx.Module):
    """Projections q, k, v, o with RMS norms of q and k over the full width."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.q = Linear(dim, dim, axes=("embed", "heads"), **kinds)
        self.k = Linear(dim, dim, axes=("embed", "heads"), **kinds)
        self.v = Linear(dim, dim, axes=("embed", "heads"), **kinds)
        self.o = Linear(dim, dim, axes=("heads", "embed"), **kinds)
        self.norm_q = RMSNorm(dim, eps, param_dtype=param_dtype)
        self.norm_k = RMSNorm(dim, eps, param_dtype=param_dtype)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads

    def heads(self, x: Float[Array, "B L D"]) -> Float[Array, "B L N K"]:
        """Split the width into heads."""
        return rearrange(x, "B L (N K) -> B L N K", N=self.num_heads)

    def project_out(self, x: Float[Array, "B L N K"]) -> Float[Array, "B L D"]:
        """Merge the heads and apply `o`."""
        return self.o(rearrange(x, "B L N K -> B L (N K)"))


class RotaryAttention(Attention):
    """Attention between token grids with rotary positions on both sides.

    Self-attention when the keys are of `x`; CityRAG's geo attention when they are not.
    `name` is what rematerialisation knows the kernel's residuals by.
    """

    def __init__(self, dim, num_heads, eps, *, name=None, dtype, param_dtype, rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(dim, num_heads, eps, **kinds)
        self.name = name

    def keys(
        self, source: Float[Array, "B S D"], angles: Float[Array, "S R 2"]
    ) -> Keys:
        """Make the keys and values of a source, whose tokens stand at `angles`."""
        k = rotate(self.heads(self.norm_k(self.k(source))), angles)
        return Keys(k, self.heads(self.v(source)))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        x_angles: Float[Array, "L R 2"],
        keys: Keys,
        length: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        # The logits' scale goes into the queries while they are float32: behind that it
        # would be one more rounding of each, and splash has no other place for it.
        scale = self.head_dim**-0.5
        q = rotate(self.heads(self.norm_q(self.q(x))), x_angles * scale)
        kernel = partial(attend, scale=1.0, name=self.name)
        exchange = partial(parallel.exchange_heads, whole_keys=keys.whole)
        return self.project_out(exchange(kernel, q, keys.k, keys.v, length))


class TextAttention(Attention):
    """Cross-attention to the text rows; no positions, and padding rows take part.

    A single row takes all the weight, whatever the queries: its value is the result,
    one vector a clip, and there is no key.
    """

    def keys(self, text: Float[Array, "B S D"], image: None = None) -> tuple[Keys, ...]:
        """Make the keys and values of the text rows."""
        if text.shape[1] == 1:
            return (Keys(None, self.heads(self.v(text))),)
        return (self._keys(text, self.k, self.v, self.norm_k),)

    def __call__(
        self, x: Float[Array, "B L D"], keys: tuple[Keys, ...]
    ) -> Float[Array, "B _ D"]:
        if keys[0].k is None:
            return self.project_out(keys[0].v)
        q = self.heads(self.norm_q(self.q(x)))
        out = [parallel.share_keys(attend, q, each.k, each.v) for each in keys]
        return self.project_out(sum(out[1:], start=out[0]))

    def _keys(self, rows, key, value, norm):
        return Keys(self.heads(norm(key(rows))), self.heads(value(rows)))


class ImageTextAttention(TextAttention):
    """Cross-attention to text and to image rows: two softmaxes, summed before `o`."""

    def __init__(self, dim, num_heads, eps, *, dtype, param_dtype, rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(dim, num_heads, eps, **kinds)
        self.k_img = Linear(dim, dim, axes=("embed", "heads"), **kinds)
        self.v_img = Linear(dim, dim, axes=("embed", "heads"), **kinds)
        self.norm_k_img = RMSNorm(dim, eps, param_dtype=param_dtype)

    def keys(
        self, text: Float[Array, "B S D"], image: Float[Array, "B I D"]
    ) -> tuple[Keys, ...]:
        """Make the keys and values of the text rows and of the image rows."""
        return (
            self._keys(text, self.k, self.v, self.norm_k),
            self._keys(image, self.k_img, self.v_img, self.norm_k_img),
        )
