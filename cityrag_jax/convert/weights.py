"""Load PyTorch checkpoints into our modules."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cityrag_jax.convert.files import CheckpointReader
from cityrag_jax.convert.names import (
    NAMINGS,
    Alias,
    TorchName,
    clip_alias,
    clip_names,
    dit_alias,
    dit_names,
    same_name,
    umt5_alias,
    umt5_name,
    vae_names,
)
from cityrag_jax.model.clip_vision import CLIPVision, CLIPVisionConfig
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.umt5 import UMT5Config, UMT5Encoder
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
    table = dit_names(config.patch)
    return _load(path, _builder(WanDiT, config, dtype), table, mesh, dit_alias)


def load_vae(
    path: str | Path,
    config: VAEConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> WanVAE:
    """Load a Wan autoencoder as `load_dit` loads a transformer."""
    return _load(
        path, _builder(WanVAE, config, dtype), vae_names(config.num_res_blocks), mesh
    )


def load_umt5(
    path: str | Path,
    config: UMT5Config,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> UMT5Encoder:
    """Load the text encoder as `load_dit` loads a transformer.

    Official naming or transformers', whose embedding has one of two names or both.
    """
    return _load(
        path, _builder(UMT5Encoder, config, dtype), umt5_name, mesh, umt5_alias
    )


def load_clip_vision(
    path: str | Path,
    config: CLIPVisionConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> CLIPVision:
    """Load the image tower of a CLIP as `load_dit` loads a transformer.

    Official naming or transformers'; what Wan does not use (the text tower, the last
    block, what follows it) is left in the file and may be absent.
    """
    table = clip_names(config.patch_size)
    return _load(
        path,
        _builder(CLIPVision, config, dtype),
        table,
        mesh,
        clip_alias(config.num_layers),
    )


class AliasedReader:
    """A reader under the names of our tables; what the alias drops is not there."""

    def __init__(self, reader: CheckpointReader, alias: Alias):
        self.path, self._reader = reader.path, reader
        # Of two tensors with one alias, such as a tied embedding's, either will do.
        pairs = {alias(name): name for name in sorted(reader.names())}
        self._name = {alias: name for alias, name in pairs.items() if alias is not None}

    def names(self) -> set[str]:
        """Give the names of all tensors that are wanted, or unexpected."""
        return set(self._name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape without reading it."""
        return self._reader.shape(self._name[name])

    def dtype(self, name: str) -> str:
        """Give a tensor's type without reading it."""
        return self._reader.dtype(self._name[name])

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in the type it is stored in."""
        return self._reader.read(self._name[name])

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Read some rows of a tensor."""
        return self._reader.read_rows(self._name[name], rows)


def _builder(model_class, config, dtype):
    """Give the function that builds a module whose parameters and linears are dtype."""
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    return lambda: model_class(config, rngs=nnx.Rngs(0))


def _load(path, build, table, mesh, alias=same_name):
    """Build the module abstractly, check every name and shape, then read."""
    graph, params = nnx.split(nnx.eval_shape(build))
    flat = dict(_flatten(params))
    names = {ours: table(ours) for ours in flat}
    reader = AliasedReader(CheckpointReader(path), alias)
    naming = find_naming(reader, flat, names)
    shardings = {} if mesh is None else dict(_flatten(param_shardings(params, mesh)))
    for ours, param in flat.items():
        value = _read(reader, param, names[ours], naming)
        sharding = shardings[ours].get_value() if mesh is not None else None
        param.set_value(_place(value, sharding))
    return nnx.merge(graph, params)


def find_naming(
    reader: AliasedReader,
    params: Mapping[str, nnx.Variable],
    names: Mapping[str, TorchName],
) -> str:
    """Find out the naming of a checkpoint that is to fill `params`, by dotted path.

    Raises one ValueError about every tensor that is missing, unexpected or misshapen.
    """
    present = reader.names()
    wanted = {naming: _wanted_shapes(params, names, naming) for naming in NAMINGS}
    naming = max(NAMINGS, key=lambda naming: len(present & wanted[naming].keys()))
    _check(reader, present, wanted[naming], naming)
    return naming


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
        for layer in _layers(names[ours], param):
            shapes |= names[ours].shapes(naming, shape, layer)
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
        return name.read(naming, reader.read).astype(param.dtype)
    stack = np.empty(param.shape, param.dtype)
    for layer in _layers(name, param):
        stack[layer] = name.read(naming, reader.read, layer)
    return stack


def _place(value, sharding):
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])
