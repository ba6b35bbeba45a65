"""The device mesh, the table from logical axes to mesh axes, and Ulysses' exchange.

Mesh axes: `data` and `fsdp` split the batch, `fsdp` also splits parameters, `sequence`
splits tokens. Models name logical axes; only this file knows the mesh. Without a mesh
in context (`jax.set_mesh`) every function here is the identity on one device.

Sequence exchange after DeepSpeed-Ulysses (arXiv 2309.14509).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

MESH_AXES = ("data", "fsdp", "sequence")
KEPT = Path("cityrag_jax", "xla")  # compiled programs, in the user's cache folder

# Logical axis -> mesh axes. An axis that does not divide its dimension is dropped.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "embed": ("fsdp",),
    "layers": ("fsdp", "sequence"),
}

Attention = Callable[..., Float[Array, "B L N K"]]


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Build the mesh from its three sizes; their product must be the device count."""
    devices = list(jax.devices() if devices is None else devices)
    shape = (data, fsdp, sequence)
    if np.prod(shape) != len(devices):
        raise ValueError(
            f"Mesh data x fsdp x sequence = {data} x {fsdp} x {sequence} needs "
            f"{np.prod(shape)} devices, there are {len(devices)}; change the mesh."
        )
    return Mesh(
        np.asarray(devices).reshape(shape),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(shape),
    )


def partition(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """Map logical axes of an array to mesh axes of the current mesh that divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    entries = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(n for n in RULES.get(axis or "", ()) if sizes.get(n, 1) > 1)
        divides = names and size % int(np.prod([sizes[n] for n in names])) == 0
        entries.append(names if divides else None)
    return PartitionSpec(*entries)


def shard(x: Array, *axes: str | None) -> Array:
    """Constrain `x` to the mesh along its logical axes; nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes))


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """Give a NamedSharding for every variable of a module or `nnx.State`.

    A stacked variable has one more dimension than its declared axes: the layer axis,
    which `lax.scan` walks and which is therefore never split.
    """

    def sharding(variable: nnx.Variable) -> nnx.Variable:
        shape = variable.get_value().shape
        axes = tuple(variable.get_metadata().get("axes") or (None,) * len(shape))
        axes = (None,) * (len(shape) - len(axes)) + axes
        return variable.replace(NamedSharding(mesh, partition(shape, axes)))

    with jax.set_mesh(mesh):
        return jax.tree.map(
            sharding, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )


def axis_size(name: str) -> int:
    """Give the size of a mesh axis in context; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)).get(name, 1)


def platform() -> str:
    """Name the platform that code traced now will run on: cpu, gpu or tpu."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = device.device_kind if device is not None else ""
    if kind.startswith("TPU"):
        return "tpu"
    return "gpu" if "NVIDIA" in kind else jax.default_backend()


def loading_dtype() -> DTypeLike | None:
    """Give the type to load models in: float32 on CPUs, whose bfloat16 is emulated.

    None elsewhere: what the model's config says.
    """
    return jnp.float32 if jax.default_backend() == "cpu" else None


def keep_compilations() -> Path | None:
    """Keep compiled programs for the next process: in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR names another one, JAX_ENABLE_COMPILATION_CACHE=0 keeps
    nothing. JAX files a program by its code, the versions, the flags and the device, on
    a CPU by its instruction set too: unlike machines may share a folder. Nothing is
    ever thrown out of it, and deleting it is safe. Gives the folder, None if it cannot
    be written to.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(jax.config.jax_compilation_cache_dir or cache / KEPT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("%s; every run will compile its programs anew.", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def exchange_heads(
    attend: Attention,
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    kv_length: Int[Array, " B"] | None,
) -> Float[Array, "B L N K"]:
    """Run `attend` with whole sequences of some heads on each device (Ulysses).

    Tokens come in and go out split over `sequence`; in between, heads are.
    L, S and N must be multiples of the size of `sequence`.
    """
    degree = axis_size("sequence")
    if q.shape[2] % degree:
        raise ValueError(
            f"{q.shape[2]} heads do not divide over mesh.sequence = {degree}; "
            f"choose a size that divides {q.shape[2]}."
        )

    def local(q: Array, k: Array, v: Array, kv_length: Array | None) -> Array:
        def heads(x: Array) -> Array:
            return jax.lax.all_to_all(x, "sequence", 2, 1, tiled=True)

        out = attend(heads(q), heads(k), heads(v), kv_length)
        return jax.lax.all_to_all(out, "sequence", 1, 2, tiled=True)

    return _on_each_device(
        local if degree > 1 else attend, q, k, v, kv_length, "tokens"
    )


def share_keys(
    attend: Attention,
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
) -> Float[Array, "B L N K"]:
    """Run `attend` on split queries with short, replicated keys and values."""
    return _on_each_device(attend, q, k, v, None, None)


def _on_each_device(attend, q, k, v, kv_length, key_axis):
    """Fused kernels cannot be split by the compiler, so each device runs its own."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, kv_length)
    query = partition(q.shape, ("batch", "tokens", None, None))
    keys = partition(k.shape, ("batch", key_axis, None, None))
    lengths = PartitionSpec(query[0])
    return jax.shard_map(
        attend,
        in_specs=(query, keys, keys, None if kv_length is None else lengths),
        out_specs=query,
        check_vma=False,  # the fused kernels do not declare how they vary
    )(q, k, v, kv_length)
