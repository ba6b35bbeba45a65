"""Prompts through the whole UMT5-XXL on a small machine, one block at a time.

Of 11 GB of published weights one block's lie in memory, and of the embedding the rows
of the prompts' own tokens. Rows are computed at the prompts' true length, padded to a
multiple of `STEP`: padding is masked, so the features are those of 512 rows. Measured
at full width, with 2 and with 4 blocks: 1.4 GiB of anonymous memory at the peak.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from cityrag_jax.convert.files import CheckpointReader
from cityrag_jax.convert.names import umt5_alias, umt5_name
from cityrag_jax.convert.weights import AliasedReader, find_naming
from cityrag_jax.model.layers import RMSNorm
from cityrag_jax.model.tokenizer import Tokenizer
from cityrag_jax.model.umt5 import UMT5Block, UMT5Config, UMT5Encoder
from cityrag_jax.progress import tracked

STEP = 64
TYPES = ("float32", "bfloat16", "float16", "float64")
OFFICIAL_WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_TOKENIZER = "google/umt5-xxl"
DIFFUSERS_WEIGHTS = "text_encoder"
DIFFUSERS_TOKENIZER = "tokenizer"


def encode_prompts(
    source: Path, prompts: Sequence[str], *, dtype: DTypeLike = jnp.float32
) -> list[np.ndarray]:
    """Encode prompts with the text encoder of a checkpoint folder.

    Gives float32 rows [S, E] for each prompt, cut at its true length (1 to 512).
    `source` is the official folder or diffusers'; `dtype` is the linears' arithmetic.
    Raises ValueError that names every missing file and every tensor that does not fit,
    and one where a block's result is not finite.
    """
    weights, tokenizer = find_text_encoder(source)
    reader = _reader(weights)
    config, naming = _read_config(reader, dtype)
    ids, mask = Tokenizer(tokenizer)(prompts)
    if ids.max(initial=0) >= config.vocab_size:
        raise ValueError(
            f"{tokenizer} gives the token {ids.max()}, {weights} embeds "
            f"{config.vocab_size}; they are not of the same checkpoint."
        )
    lengths = mask.sum(axis=1)
    streams = [
        _embed(reader, naming, row[: min(len(row), -(-length // STEP) * STEP)])
        for row, length in zip(ids, lengths, strict=True)
    ]
    with jax.default_matmul_precision("highest"):
        count = config.num_layers
        for layer in tracked(range(count), "text encoder", count, "layer"):
            block = _read_block(reader, naming, config, layer)
            streams = [
                _run(*block, x, n) for x, n in zip(streams, lengths, strict=True)
            ]
            del block  # before the next is read: one block is the peak
            _check_finite(streams, weights, f"block {layer} or the embedding")
        norm = _read_norm(reader, naming, config)
        streams = [norm(x) for x in streams]
    _check_finite(streams, weights, "norm")
    return [
        np.asarray(x)[0, :length] for x, length in zip(streams, lengths, strict=True)
    ]


def _check_finite(streams, weights, place):
    if not all(jnp.isfinite(x).all() for x in streams):
        raise ValueError(
            f"{weights} holds values that are not finite, in its {place}; fetch it "
            "again."
        )


def find_text_encoder(source: str | Path) -> tuple[Path, Path]:
    """Find the weights of the text encoder and the folder of its tokeniser.

    Raises one ValueError that names every file that is missing or cannot be read and
    every tensor that does not fit, before anything is computed.
    """
    source = Path(source)
    if (source / DIFFUSERS_WEIGHTS).is_dir() or (source / "model_index.json").exists():
        weights, tokenizer = source / DIFFUSERS_WEIGHTS, source / DIFFUSERS_TOKENIZER
    else:
        weights, tokenizer = source / OFFICIAL_WEIGHTS, source / OFFICIAL_TOKENIZER
        safe = weights.with_suffix(".safetensors")
        weights = safe if safe.exists() and not weights.exists() else weights
    problems = []
    for check in (lambda: _read_config(_reader(weights)), lambda: Tokenizer(tokenizer)):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return weights, tokenizer


def read_text_config(weights: Path) -> UMT5Config:
    """Read the sizes of a text encoder off the shapes of its tensors."""
    return _read_config(_reader(weights))[0]


def _reader(weights):
    return AliasedReader(CheckpointReader(weights), umt5_alias)


def _read_config(reader, dtype=jnp.float32):
    """Read sizes off the tensors' shapes, then check every name, shape and type."""
    names = reader.names()
    naming = "diffusers" if "shared.weight" in names else "official"

    def shape(path: str, layer: int | None = None) -> tuple[int, ...]:
        name = umt5_name(path).name(naming, layer)
        found = reader.shape(name) if name in names else None
        if found is None or len(found) != 2:
            raise ValueError(
                f"{reader.path} is no UMT5 text encoder: it has no matrix {name}; give "
                "the folder of a Wan 2.1 checkpoint."
            )
        return found

    vocab_size, dim = shape("token_embedding")
    num_buckets, num_heads = shape("blocks.attention.position_bias", 0)
    layers = re.compile(r"(?:encoder\.block|blocks)\.(\d+)\.")
    found = [int(match[1]) for name in names if (match := layers.match(name))]
    config = UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=shape("blocks.attention.q.kernel", 0)[0],
        num_heads=num_heads,
        ffn_dim=shape("blocks.ffn.fc1.kernel", 0)[0],
        num_layers=1 + max(found),
        num_buckets=num_buckets,
        dtype=dtype,
    )
    encoder = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    params = _by_path(nnx.state(encoder, nnx.Param))
    naming = find_naming(reader, params, {p: umt5_name(p) for p in params})
    types = {name: reader.dtype(name) for name in sorted(names)}
    odd = [f"{name} is {kind}" for name, kind in types.items() if kind not in TYPES]
    if odd:
        lines = "\n  ".join(odd)
        raise ValueError(
            f"{reader.path} holds other than {', '.join(TYPES)}:\n  {lines}"
        )
    return config, naming


def _embed(reader, naming, ids):
    """Gather the rows of the embedding that the prompt needs, each once."""
    unique, places = np.unique(ids, return_inverse=True)
    rows = reader.read_rows(umt5_name("token_embedding").name(naming), unique)
    return jnp.asarray(rows.astype(np.float32)[places])[None]


def _read_block(reader, naming, config, layer):
    """Read one block's parameters as they are stored, unless that is wider."""
    block = nnx.eval_shape(lambda: UMT5Block(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(block)
    for path, param in _by_path(params).items():
        name = umt5_name(f"blocks.{path}")
        param.set_value(_narrow(name.read(naming, reader.read, layer), config.dtype))
    return graph, params


def _read_norm(reader, naming, config):
    norm = RMSNorm(config.dim, config.eps, param_dtype=config.dtype)
    scale = umt5_name("norm.scale").read(naming, reader.read)
    norm.scale.set_value(_narrow(scale, config.dtype))
    return norm


def _narrow(value, dtype):
    wider = value.dtype.itemsize > np.dtype(dtype).itemsize
    return jnp.asarray(value.astype(dtype) if wider else value)


def _by_path(params):
    return {".".join(map(str, path)): p for path, p in nnx.to_flat_state(params)}


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, params, x, length):
    mask = jnp.arange(x.shape[1]) < length
    return nnx.merge(graph, params)(x, mask[None])
