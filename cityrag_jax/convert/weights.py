"""Load PyTorch checkpoints into our modules, and export the transformer back."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cityrag_jax.batch import PATCH
from cityrag_jax.convert.files import CheckpointReader, write_checkpoint
from cityrag_jax.convert.names import (
    DIT_IGNORED,
    NAMINGS,
    dit_name,
    vae_names,
)
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import param_shardings


def load_dit(
    path: str | Path,
    config: DiTConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> WanDiT:
    """Load a Wan transformer, without branches, from official or diffusers naming.

    `path` is a safetensors file, a folder or a shard index. Parameters and linears get
    `dtype`; with a mesh the parameters lie on it as `parallel.py` says. Raises
    ValueError naming every tensor that is missing, unexpected or of a wrong shape.
    """
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)

    def build() -> WanDiT:
        return WanDiT(config, rngs=nnx.Rngs(0))

    return _load(path, build, dit_name, mesh, ignored=DIT_IGNORED)


def load_vae(
    path: str | Path,
    config: VAEConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> WanVAE:
    """Load a Wan autoencoder as `load_dit` loads a transformer."""
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)

    def build() -> WanVAE:
        return WanVAE(config, rngs=nnx.Rngs(0))

    return _load(path, build, vae_names(config.num_res_blocks), mesh)


def export_dit(
    model: WanDiT,
    path: str | Path,
    naming: str = "official",
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the base part of a transformer, in its own type, so that PyTorch opens it.

    Branches are left out. `naming` is "official" or "diffusers". A path ending in
    .safetensors becomes one file, else a folder with shards, index and config.json.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming is {naming!r}; choose one of {', '.join(NAMINGS)}.")
    params = dict(_flatten(nnx.state(model, nnx.Param)))
    tensors, sources = {}, {}
    for ours, param in params.items():
        theirs = dit_name(ours)
        if theirs is None:
            continue
        for layer in _layers(theirs, param):
            name = theirs.name(naming, layer)
            shape = param.shape if layer is None else param.shape[1:]
            shape = theirs.layout.torch_shape(shape)
            tensors[name] = jax.ShapeDtypeStruct(shape, param.dtype)
            sources[name] = (param, layer, theirs.layout)

    def read(name: str) -> np.ndarray:
        param, layer, layout = sources[name]
        value = param[...] if layer is None else param[layer]
        return layout.to_torch(np.asarray(value))

    config = _dit_config(model.config, naming)
    write_checkpoint(path, tensors, read, config, max_shard_bytes=max_shard_bytes)


def _load(path, build, table, mesh, ignored=()):
    """Build the module abstractly, check every name and shape, then read."""
    graph, params = nnx.split(nnx.eval_shape(build))
    flat = dict(_flatten(params))
    names = {ours: table(ours) for ours in flat}
    reader = CheckpointReader(path)
    present = {n for n in reader.names() if not n.endswith(tuple(ignored) or ("\0",))}
    wanted = {naming: _wanted_shapes(flat, names, naming) for naming in NAMINGS}
    naming = max(NAMINGS, key=lambda naming: len(present & wanted[naming].keys()))
    _check(reader, present, wanted[naming], naming)
    shardings = {} if mesh is None else dict(_flatten(param_shardings(params, mesh)))
    for ours, param in flat.items():
        value = _read(reader, param, names[ours], naming)
        sharding = shardings[ours].get_value() if mesh is not None else None
        param.set_value(_place(value, sharding))
    return nnx.merge(graph, params)


def _flatten(params):
    """Yield (dotted path, variable) of every parameter."""
    for path, variable in nnx.to_flat_state(params):
        yield ".".join(map(str, path)), variable


def _layers(name, param):
    """List the layers of a stacked parameter; [None] for one that is not stacked."""
    return range(param.shape[0]) if name.stacked else [None]


def _wanted_shapes(flat, names, naming):
    """Map every name that the checkpoint must hold to its shape there."""
    shapes = {}
    for ours, param in flat.items():
        shape = param.shape[1:] if names[ours].stacked else param.shape
        shape = names[ours].layout.torch_shape(shape)
        for layer in _layers(names[ours], param):
            shapes[names[ours].name(naming, layer)] = shape
    return shapes


def _check(reader, present, wanted, naming):
    """Raise one ValueError about everything in which the checkpoint differs."""
    complaints = [f"missing: {name} {wanted[name]}" for name in wanted.keys() - present]
    complaints += [
        f"unexpected: {name} {reader.shape(name)}" for name in present - wanted.keys()
    ]
    for name in wanted.keys() & present:
        if reader.shape(name) != wanted[name]:
            complaints.append(
                f"wrong shape: {name} is {reader.shape(name)}, "
                f"the config wants {wanted[name]}"
            )
    if complaints:
        lines = "\n  ".join(sorted(complaints))
        raise ValueError(
            f"{reader.path}, read with {naming} names, does not fit the config in "
            f"{len(complaints)} tensors; compare the config with the checkpoint's "
            f"config.json:\n  {lines}"
        )


def _read(reader, param, name, naming):
    """Read one parameter, all layers of a stacked one, in our axes and type."""
    if not name.stacked:
        tensor = reader.read(name.name(naming))
        return name.layout.to_ours(tensor).astype(param.dtype)
    stack = np.empty(param.shape, param.dtype)
    for layer in _layers(name, param):
        stack[layer] = name.layout.to_ours(reader.read(name.name(naming, layer)))
    return stack


def _place(value, sharding):
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


def _dit_config(config, naming):
    """Give the config.json that the naming's own classes are built from."""
    if naming == "official":
        return {
            "_class_name": "WanModel",
            "model_type": "t2v" if config.image_dim is None else "i2v",
            "dim": config.dim,
            "eps": config.eps,
            "ffn_dim": config.ffn_dim,
            "freq_dim": config.freq_dim,
            "in_dim": config.in_channels,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "out_dim": config.out_channels,
            "text_dim": config.text_dim,
            "text_len": config.text_len,
        }
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": [1, PATCH, PATCH],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
