"""The items of a bundle's module: what Orbax sees.

A bundle's module is a folder of items, each an Orbax folder of its own: `rest` with the
parameters that are not stacked, `block_000` with layer 0 of every stacked one, and so
on; kernels perhaps as int8 beside their scales (`quantise.py`). Reading goes item by
item straight onto the shards, so that neither host nor device ever holds more than the
result and one item.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from cityrag_jax.checkpoint import memory
from cityrag_jax.checkpoint.descriptions import Arrays
from cityrag_jax.checkpoint.digests import (
    Damaged,
    broken_arrays,
    compare_names,
    digest_arrays,
    raise_damaged,
    trusted,
    unreadable,
)
from cityrag_jax.checkpoint.files import read_json, write_json
from cityrag_jax.checkpoint.quantise import INT8, dequantise, quantise, with_scales
from cityrag_jax.int8 import parameter_of
from cityrag_jax.parallel import is_writer, on_writer

REST = "rest"
DIGESTS = "digests.json"
READ_BYTES = 256 * 2**20  # of arrays that are read together into the host's memory
CHUNK_BYTES = 16 * 2**20  # a process reads the chunks that its shards touch
# Arrays that are written at a time: tensorstore copies what it cuts into chunks.
WRITE_BYTES = 256 * 2**20


def block_name(layer: int) -> str:
    """Name the item of a layer."""
    return f"block_{layer:03}"


def write_arrays(
    folder: Path,
    values: Arrays,
    stacked: frozenset[str],
    dtype: DTypeLike | None = None,
) -> None:
    """Write arrays as a new folder of items with their digests.

    `dtype` casts them, int8 as `quantise.py` says; without it they stay what they are.
    """
    on_writer(lambda: folder.mkdir(parents=True, exist_ok=True))
    digests = {}
    for item, arrays in _split_items(values, stacked):
        if dtype is not None and np.dtype(dtype) == INT8:
            arrays = quantise(arrays)
        elif dtype is not None:
            dtypes = dict.fromkeys(arrays, np.dtype(dtype))
            arrays = _cast(dequantise(arrays, dtypes), dtypes)
        digests[item] = write_item(folder / item, arrays)
    if is_writer():
        write_json(folder / DIGESTS, digests)


def write_item(
    path: Path,
    arrays: Arrays,
    *,
    compress: bool = True,
    digest: Callable[[Arrays], dict[str, int]] = digest_arrays,
) -> dict[str, int]:
    """Write one item, whose arrays are JAX's, and give its digests."""
    context = ocp.Context()
    context.array.saving.use_compression = compress
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    largest = max(x.nbytes for x in arrays.values())  # Orbax wants more than that
    context.memory.write_concurrent_bytes = max(WRITE_BYTES, largest + 1)
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    context.memory.deepcopy_host_arrays = False  # nobody writes to them meanwhile
    with context:
        ocp.save(path.absolute(), arrays)
    # Orbax writes the folder's name of that moment there; nobody reads it.
    committed = path / "commit_success.txt"
    if is_writer() and committed.exists():
        committed.write_text("Checkpoint commit was successful")
    memory.give_back()
    return digest(arrays)


def read_arrays(
    folder: Path,
    wanted: Arrays,
    stacked: frozenset[str],
    *,
    verify: bool | None = None,
) -> Arrays:
    """Read arrays as `wanted` says (shape, type, sharding), item by item.

    Raises one ValueError with all names and shapes that differ, or, unless disks are
    trusted or `verify` is False, all arrays whose checksum does not fit or is missing.
    """
    verify = not trusted() if verify is None else verify
    plan = plan_items(wanted, stacked)
    stored = {item.name: item_arrays(item) for item in _item_folders(folder)}
    digests = read_json(folder / DIGESTS) if verify else {}
    lost = [str(folder / item) for item in digests if item not in stored]
    if lost:
        raise Damaged(
            f"{', '.join(lost[:3])}{', ...' * (len(lost) > 3)} is missing, which "
            f"{folder / DIGESTS} lists; take another copy."
        )
    on_disk = {item: with_scales(plan[item], stored.get(item, {})) for item in plan}
    compare_names(_by_layer(on_disk), _by_layer(stored), folder)
    stacks = _zeros({n: x for n, x in wanted.items() if is_stacked(n, stacked)})
    result, broken = {}, []
    for item, shapes in plan.items():
        arrays = _load(folder / item, on_disk[item], stored[item])
        if verify:
            broken += broken_arrays(arrays, digests.get(item, {}), f"{item}/")
        dtypes = {n: x.dtype for n, x in shapes.items()}
        arrays = dequantise(arrays, dtypes)
        if item == REST:
            result |= _cast(arrays, dtypes)
        else:
            layer = int(item.rpartition("_")[2])
            some = {name: stacks[name] for name in arrays}
            stacks |= _insert(some, arrays, layer)
        # Left to run ahead, host copies of many items wait for their transfer.
        jax.block_until_ready((result, stacks))
        del arrays
        memory.give_back()
    raise_damaged(broken, sum(map(len, on_disk.values())), folder)
    result |= stacks
    for name, x in wanted.items():
        assert result[name].sharding.is_equivalent_to(x.sharding, len(x.shape)), name
    # Equivalent shardings may be spelt differently, and jit compiles for each spelling.
    return {
        name: jax.device_put(result[name], x.sharding) for name, x in wanted.items()
    }


def find_damage(folder: Path) -> list[str]:
    """Compare every array of a module with its digest, a few in memory at a time.

    Gives a line for each array that differs and each item that cannot be read.
    """
    digests = read_json(folder / DIGESTS)
    lines = []
    for item in sorted(digests.keys() | {i.name for i in _item_folders(folder)}):
        path = folder / item
        if item not in digests or not path.is_dir():
            lines.append(f"{path}: {'not listed' if path.is_dir() else 'missing'}")
            continue
        try:
            lines += _item_damage(path, digests[item])
        except ValueError as error:
            lines.append(str(error))
    return lines


def _item_damage(path: Path, digests: Mapping[str, int]) -> list[str]:
    stored = item_arrays(path)
    lines = [f"{path}: no {name}" for name in sorted(digests.keys() - stored.keys())]
    for some in groups(stored):
        lines += broken_arrays(read_some(path, some, stored), digests, f"{path}: ")
        memory.give_back()
    return lines


def groups(arrays: Arrays) -> list[Arrays]:
    """Cut arrays, in order, where they become large: each reading has its price."""
    found, size = [{}], 0
    for name, x in arrays.items():
        num_bytes = math.prod(x.shape) * x.dtype.itemsize
        if found[-1] and size + num_bytes > READ_BYTES:
            found.append({})
            size = 0
        found[-1][name] = x
        size += num_bytes
    return found


def plan_items(wanted: Arrays, stacked: frozenset[str]) -> dict[str, Arrays]:
    """Say which abstract arrays each item holds, layers with their own shardings."""
    plan: dict[str, Arrays] = {}
    for name, x in wanted.items():
        if not is_stacked(name, stacked):
            plan.setdefault(REST, {})[name] = x
            continue
        layer = abstract_layer(x)
        for i in range(x.shape[0]):
            plan.setdefault(block_name(i), {})[name] = layer
    return dict(sorted(plan.items(), key=lambda item: (item[0] != REST, item[0])))


def _split_items(values, stacked) -> Iterator[tuple[str, Arrays]]:
    stacks = {n: x for n, x in values.items() if is_stacked(n, stacked)}
    rest = {n: x for n, x in values.items() if n not in stacks}
    if rest:
        yield REST, rest
    for layer in range(max((len(x) for x in stacks.values()), default=0)):
        deep = {n: x for n, x in stacks.items() if len(x) > layer}
        yield block_name(layer), _take(deep, layer)


def _cast(arrays: Arrays, dtypes: Mapping[str, np.dtype]) -> Arrays:
    """Cast on the devices those that have another type, in one program."""
    others = {n: x for n, x in arrays.items() if x.dtype != dtypes[n]}
    return arrays | _astype(others, tuple(dtypes[n] for n in others))


@functools.partial(jax.jit, static_argnums=1)
def _astype(arrays, dtypes):
    pairs = zip(arrays.items(), dtypes, strict=True)
    return {name: x.astype(dtype) for (name, x), dtype in pairs}


@jax.jit
def _take(stacks, layer):
    return {
        name: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        for name, x in stacks.items()
    }


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stacks, layers, index):
    return {
        name: jax.lax.dynamic_update_index_in_dim(
            x, layers[name].astype(x.dtype), index, 0
        )
        for name, x in stacks.items()
    }


def _zeros(wanted: Arrays) -> Arrays:
    """Make all in one program: a compilation each would take longer than reading."""

    def make():
        return {name: jnp.zeros(x.shape, x.dtype) for name, x in wanted.items()}

    return jax.jit(make, out_shardings={n: x.sharding for n, x in wanted.items()})()


def _item_folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir()]


def _by_layer(items: Mapping[str, Arrays]) -> Arrays:
    return {
        f"{name}@{item.rpartition('_')[2]}" if item != REST else name: x
        for item, arrays in items.items()
        for name, x in arrays.items()
    }


def item_arrays(path: Path) -> Arrays:
    """Give shape and type of every array of an item."""
    try:
        return dict(ocp.metadata(path.absolute()).metadata)
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise unreadable(path, error) from error


def read_some(path: Path, some: Collection[str], stored: Arrays) -> Arrays:
    """Read some of an item's arrays, as they are stored, into the host's memory."""
    host = _host()
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
        for name, x in stored.items()
        if name in some
    }
    return _load(path, shapes, stored)


def on_host(x: np.ndarray) -> jax.Array:
    """Make an array JAX's: only of those does Orbax limit how many it writes."""
    return jax.block_until_ready(jax.device_put(x, _host()))


def _host() -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def _load(path: Path, wanted: Arrays, stored: Arrays) -> Arrays:
    # Read in the stored type: Orbax would cast silently and the digest would not fit.
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, stored[name].dtype, sharding=x.sharding)
        for name, x in wanted.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = abstract.keys() != stored.keys()
    try:
        with context:
            return ocp.load(path.absolute(), abstract)
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise unreadable(path, error) from error


def is_stacked(name: str, stacked: frozenset[str]) -> bool:
    """Say whether an array is; optimiser leaves are named `path/of/state/parameter`."""
    return parameter_of(name.rpartition("/")[2]) in stacked


def abstract_layer(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Give a layer of an abstract stack; what split the layers splits its next axis."""
    sharding = _layer_sharding(x.shape, x.sharding)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)


def _layer_sharding(shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    first, *rest = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    if first is not None:
        names = first if isinstance(first, tuple) else (first,)
        size = int(np.prod([sharding.mesh.shape[n] for n in names]))
        fits = [i for i, n in enumerate(shape[1:]) if rest[i] is None and n % size == 0]
        if fits:
            rest[fits[0]] = first
    return NamedSharding(sharding.mesh, PartitionSpec(*rest))
