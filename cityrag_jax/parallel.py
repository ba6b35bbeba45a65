"""Processes, the device mesh, the rules from logical axes to it, Ulysses' exchange.

Several processes run one program: each calls everything here, and whatever computes,
reads or saves arrays, at the same place. One of them, the writer, writes the files that
are not arrays. What a process feeds follows from where its devices stand on the mesh.

Mesh axes: `data` and `fsdp` split the batch, `fsdp` also splits parameters, `sequence`
splits tokens. Models name logical axes; only this file knows the mesh. Without a mesh
in context (`layout` or `jax.set_mesh`) every function here is the identity on one
device.

Sequence exchange after DeepSpeed-Ulysses (arXiv 2309.14509).
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int64, PyTree, Shaped

MESH_AXES = ("data", "fsdp", "sequence")
KEPT = Path("cityrag_jax", "xla")  # compiled programs, in the user's cache folder

Rules = Mapping[str, Sequence[str]]  # logical axis -> mesh axes

# A dimension that its mesh axes do not divide is left whole. `heads` and `mlp` are the
# other sides of the kernels that have `embed` on one.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "embed": ("fsdp",),
    "heads": (),
    "mlp": (),
}
# Part of the key of every traced program, as the mesh is.
_rules = jax.make_user_context(tuple(RULES.items()))

Attention = Callable[..., Float[Array, "B L N K"]]

# What --distributed reads; JAX itself reads the first alone.
PROCESS_VARIABLES = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
)
DISTRIBUTED = (
    "This is one of several processes: host:port of the first, their count and the "
    f"number of this one stand in {', '.join(PROCESS_VARIABLES)}. Under SLURM, Open "
    "MPI, on TPU pods and in indexed Kubernetes jobs it is found out without this."
)
# GB that a GPU's programs may pin (openxla/xla, pull request 20633).
HOST_MEMORY = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
MESSAGE_BYTES = 4096


def initialise(distributed: bool = False, *, alone: bool = False) -> None:
    """Join the other processes, if this is one of several; once, before any device.

    With `distributed` as `DISTRIBUTED` says. Without it, or without any of its
    variables, where JAX detects a launcher that started several. Who is to work `alone`
    joins nobody. Saving and offloading
    may fill the host's memory: by default GPUs' programs get 64 GB of it.
    """
    os.environ.setdefault(HOST_MEMORY, str(max(64, _host_memory_gb())))
    if alone:
        return
    given = {name: os.environ.get(name) for name in PROCESS_VARIABLES}
    missing = [name for name, value in given.items() if not value]
    if distributed and not missing:
        address, *numbers = given.values()
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{given} must be a host:port and two whole numbers.")
        count, number = map(int, numbers)
        if number >= count:
            raise ValueError(
                f"JAX_PROCESS_ID is {number} of JAX_NUM_PROCESSES {count}; count from "
                "0."
            )
        jax.distributed.initialize(address, count, number)
    elif launcher() and len(missing) == len(given):
        jax.distributed.initialize()
    elif distributed:
        raise ValueError(
            f"--distributed needs {', '.join(missing)}, and no launcher was detected; "
            "set host:port of the first process, the count of all, and the number of "
            "this one from 0."
        )


def _host_memory_gb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**9


def launcher() -> str | None:
    """Name what started this process as one of several, by JAX's own detection."""
    from jax._src.clusters import ClusterEnv  # its only list of launchers

    for kind in ClusterEnv._cluster_types:
        alone = kind.name == "k8s" and "JOB_COMPLETION_INDEX" not in os.environ
        if not kind.opt_in_only_method and not alone and kind.is_env_present():
            return kind.name if kind.get_process_count() > 1 else None
    return None


def is_writer() -> bool:
    """Say whether this process writes what is no array: one of all does."""
    return jax.process_index() == 0


def on_writer(action: Callable[[], object]) -> None:
    """Run an action in the writer alone; all processes wait for it.

    Its ValueError or OSError is raised in all of them.
    """
    error = None
    if is_writer():
        try:
            action()
        except (ValueError, OSError) as raised:
            error = raised
    if jax.process_count() > 1:
        text = np.zeros(MESSAGE_BYTES, np.uint8)
        said = str(error or "").encode()[:MESSAGE_BYTES] or b"?" * bool(error)
        text[: len(said)] = np.frombuffer(said, np.uint8)
        told = multihost_utils.broadcast_one_to_all(text).tobytes().rstrip(b"\0")
        if told and error is None:
            raise ValueError(told.decode(errors="replace"))
    if error is not None:
        raise error


def from_writer(value: np.ndarray | np.generic) -> np.ndarray:
    """Give the writer's array to all processes, whose own has its shape and type."""
    if jax.process_count() == 1:
        return np.asarray(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


# What Gloo and NCCL say of a process whose connection has gone.
PEER_LOST = (
    *("Connection reset by peer", "Connection closed by peer", "Broken pipe"),
    *("ncclRemoteError", "remote process exiting", "heartbeat timeout"),
)


def is_peer_lost(error: BaseException) -> bool:
    """Say whether a collective failed because another process has gone."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
        return False
    return any(words in str(error) for words in PEER_LOST)


def any_process(values: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Say which values are true in any process, so that all decide the same."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.process_allgather(values).any(axis=0)


def fetch(tree: PyTree) -> PyTree:
    """Give small arrays to every process as NumPy's, however they are split."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def fill_mesh(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Replace the one size that may be -1 so that the product is `count` devices."""
    open_axes = [name for name, size in sizes.items() if size == -1]
    rest = int(np.prod([size for size in sizes.values() if size != -1]))
    if not open_axes:
        return dict(sizes)
    if len(open_axes) > 1 or rest < 1 or count % rest:
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"Mesh {shown} cannot be filled from {count} devices; give one -1, and "
            f"sizes of 1 or more whose product divides {count}."
        )
    return dict(sizes) | {open_axes[0]: count // rest}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Build the mesh from its three sizes; their product must be the device count.

    One of them may be -1: what remains. On TPUs devices stand so that the axes lie
    along the links of the torus, elsewhere in the order of their numbers, which is that
    of the processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    given = dict(zip(MESH_AXES, (data, fsdp, sequence), strict=True))
    shape = tuple(fill_mesh(given, len(devices)).values())
    if np.prod(shape) != len(devices):
        raise ValueError(
            f"Mesh data x fsdp x sequence = {data} x {fsdp} x {sequence} needs "
            f"{np.prod(shape)} devices, there are {len(devices)}; change the mesh."
        )
    placed = np.asarray(devices).reshape(shape)
    if devices[0].platform == "tpu" and len(devices) > 1:
        placed = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


@contextlib.contextmanager
def layout(mesh: Mesh | None, rules: Rules | None = None) -> Iterator[None]:
    """Context: everything lies on `mesh` as `rules` say, which replace their defaults.

    Without a mesh, one device has everything. Raises ValueError as `check_rules`.
    """
    check_rules(rules or {})
    chosen = {name: tuple(axes) for name, axes in {**RULES, **(rules or {})}.items()}
    on_mesh = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with on_mesh, _rules(tuple(chosen.items())):
        yield


def check_rules(rules: Rules) -> None:
    """Raise ValueError for rules that name no axis, or that no program can follow."""
    unknown = sorted(set(rules) - set(RULES))
    unknown += sorted({n for axes in rules.values() for n in axes} - set(MESH_AXES))
    if unknown:
        raise ValueError(
            f"Rules name {', '.join(unknown)}; they lead from {', '.join(RULES)} to "
            f"{', '.join(MESH_AXES)}."
        )
    full = {**RULES, **rules}
    if tuple(full["tokens"]) != ("sequence",) or "sequence" in full["batch"]:
        raise ValueError(
            f"Rules split batch over {full['batch']} and tokens over "
            f"{full['tokens']}; heads are exchanged for tokens over sequence, so that "
            "tokens need ('sequence',) and batches the other axes."
        )
    twice = set(full["embed"]) & {*full["heads"], *full["mlp"]}
    if twice:
        raise ValueError(
            f"Rules split both sides of a kernel over {', '.join(sorted(twice))}: "
            f"embed over {full['embed']}, heads over {full['heads']}, mlp over "
            f"{full['mlp']}; choose different axes."
        )


def batch_axes() -> tuple[str, ...]:
    """Give the mesh axes that split a batch, in order."""
    return dict(_rules.value)["batch"]


def batch_share(mesh: Mesh | None, size: int) -> Int64[np.ndarray, " rows"]:
    """Give the rows of a batch of `size` that this process's devices hold, ascending.

    Processes whose devices stand at the same places of the batch axes are replicas and
    hold equal rows. Raises ValueError if the batch does not divide over those axes.
    """
    rows = np.arange(size)
    if mesh is None:
        return rows
    places = NamedSharding(mesh, PartitionSpec(batch_axes()))
    held = places.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([rows[index] for index in held]))


def place_batch(local: PyTree, mesh: Mesh | None, size: int) -> PyTree:
    """Put this process's rows (`batch_share`) of a batch of `size` on its devices."""
    if mesh is None:
        return local
    sharding = NamedSharding(mesh, PartitionSpec(batch_axes()))
    rows = batch_share(mesh, size)

    def put(x: np.ndarray) -> Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            start = int(np.searchsorted(rows, first))
            return x[start : start + last - first]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, local)


def partition(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """Map logical axes of an array to mesh axes of the current mesh that divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    rules = dict(_rules.value)
    entries = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(n for n in rules.get(axis or "", ()) if sizes.get(n, 1) > 1)
        divides = names and size % int(np.prod([sizes[n] for n in names])) == 0
        entries.append(names if divides else None)
    return PartitionSpec(*entries)


def shard(x: Array, *axes: str | None) -> Array:
    """Constrain `x` to the mesh along its logical axes; nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes))


def spread_rows(
    function: Callable[[Array], Array], *batches: Shaped[Array, "B ..."]
) -> tuple[Array, ...]:
    """Apply a function of rows to batches of one shape, all devices sharing the rows.

    The devices that hold the tokens of the same clips (`sequence`) would all do all of
    its rows; here each does some. Where they do not come out even, rows of zeros do.
    """
    share = axis_size("sequence")
    if share == 1:
        return tuple(map(function, batches))
    size, parts = len(batches[0]), math.prod(map(axis_size, batch_axes()))
    axes = batch_axes() if size % parts == 0 else ()
    count = len(batches)
    while size * count % (share * parts if axes else share):
        count += 1
    empty = [jnp.zeros_like(batches[0])] * (count - len(batches))
    rows = rearrange(jnp.stack([*batches, *empty], axis=1), "B n ... -> (B n) ...")
    places = PartitionSpec((*axes, "sequence"))
    made = function(jax.lax.with_sharding_constraint(rows, places))
    made = rearrange(made, "(B n) ... -> B n ...", n=count)
    made = shard(made, "batch", *(None,) * (made.ndim - 1))
    return tuple(made[:, i] for i in range(len(batches)))


def spread_places(
    function: Callable[[Array], Array], videos: Shaped[Array, "B T H W C"], stride: int
) -> Array:
    """Apply a function of videos, the devices that share a clip's tokens sharing it.

    Where there are too few videos for all of them, each does some rows or columns of
    the pictures, in whole multiples of `stride`; convolutions then exchange edges.
    """
    share, parts = axis_size("sequence"), math.prod(map(axis_size, batch_axes()))
    here = len(videos) // parts if len(videos) % parts == 0 else len(videos)
    fits = [i for i in (2, 3) if videos.shape[i] % (share * stride) == 0]
    if share == 1 or here % share == 0 or not fits:
        return spread_rows(function, videos)[0]
    axes = ["tokens" if i == fits[0] else None for i in range(1, videos.ndim)]
    made = function(shard(videos, "batch", *axes))
    return shard(made, "batch", *(None,) * (made.ndim - 1))


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
    *,
    whole_keys: bool = False,
) -> Float[Array, "B L N K"]:
    """Run `attend` with whole sequences of some heads on each device (Ulysses).

    Tokens come in and go out split over `sequence`; in between, heads are; those of
    `whole_keys` are from the start (`split_heads`). L, S and N must be multiples of the
    size of `sequence`.
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

        k, v = (k, v) if whole_keys else (heads(k), heads(v))
        out = attend(heads(q), k, v, kv_length)
        return jax.lax.all_to_all(out, "sequence", 1, 2, tiled=True)

    keys = (None, "tokens") if whole_keys else ("tokens", None)
    return _on_each_device(local if degree > 1 else attend, q, k, v, kv_length, keys)


def split_heads(x: Float[Array, "B S N K"]) -> Float[Array, "B S N K"]:
    """Split heads instead of tokens over `sequence`: one exchange, made once."""
    return shard(x, "batch", None, "tokens", None)


def share_keys(
    attend: Attention,
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
) -> Float[Array, "B L N K"]:
    """Run `attend` on split queries with short, replicated keys and values."""
    return _on_each_device(attend, q, k, v, None, (None, None))


def _on_each_device(attend, q, k, v, kv_length, key_axes):
    """Fused kernels cannot be split by the compiler, so each device runs its own."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, kv_length)
    query = partition(q.shape, ("batch", "tokens", None, None))
    keys = partition(k.shape, ("batch", *key_axes, None))
    lengths = PartitionSpec(query[0])
    return jax.shard_map(
        attend,
        in_specs=(query, keys, keys, None if kv_length is None else lengths),
        out_specs=query,
        check_vma=False,  # the fused kernels do not declare how they vary
    )(q, k, v, kv_length)
