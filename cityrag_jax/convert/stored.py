"""A transformer's parameters one layer at a time, so that an export needs no memory.

Bundles are read in their stored types (int8 kernels as float32), some arrays of an item
at a time, each against its digest.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cityrag_jax.checkpoint import (
    Arrays,
    Bundle,
    abstract_model,
    parameter_shardings,
    parameters,
    stacked_parameters,
)
from cityrag_jax.checkpoint.bundles import abstract_parameters
from cityrag_jax.checkpoint.digests import check_digests, compare_names
from cityrag_jax.checkpoint.files import read_json
from cityrag_jax.checkpoint.items import (
    DIGESTS,
    REST,
    block_name,
    groups,
    item_arrays,
    plan_items,
    read_some,
)
from cityrag_jax.checkpoint.quantise import dequantise, read_dtype, with_scales
from cityrag_jax.model.adapters import MARK, adapter_scales
from cityrag_jax.model.dit import WanDiT


@dataclasses.dataclass(frozen=True)
class StoredParameters:
    """Our parameters, perhaps abstract, and how to read one, or one layer of it."""

    arrays: Arrays
    read: Callable[[str, int | None], np.ndarray]


def open_transformer(bundle: Bundle, name: str) -> tuple[WanDiT, StoredParameters]:
    """Give a transformer, abstract if it lies in a bundle, and its parameters.

    Of a training that still runs, whose origin is no bundle, the model is read whole.
    """
    folder = Path(bundle.origin) / name
    if folder.is_dir():
        model = abstract_model(bundle.descriptions[name])
        return model, _on_disk(folder, model)
    model = bundle.modules[name]
    return model, in_memory(model)


def in_memory(model: WanDiT) -> StoredParameters:
    """View the parameters of a model that is read already."""
    values = parameters(model)

    def read(name: str, layer: int | None) -> np.ndarray:
        x = values[name]
        return np.asarray(x if layer is None else x[layer])

    return StoredParameters(values, read)


def merge_adapters(model: WanDiT, stored: StoredParameters) -> StoredParameters:
    """View parameters with every adapter added to its kernel, in float32, and gone."""
    scales = adapter_scales(model)

    def read(name: str, layer: int | None) -> np.ndarray:
        x = stored.read(name, layer)
        if name not in scales:
            return x
        adapter = name.removesuffix(".kernel") + MARK
        down, up = (np.float32(stored.read(adapter + f, layer)) for f in ("down", "up"))
        return (np.float32(x) + scales[name] * (down @ up)).astype(x.dtype)

    kept = {name: x for name, x in stored.arrays.items() if MARK not in name}
    return StoredParameters(kept, read)


def _on_disk(folder: Path, model: WanDiT) -> StoredParameters:
    """Read some arrays of an item at a time; names and shapes are checked before."""
    wanted = abstract_parameters(model, parameter_shardings(model, None))
    plan = plan_items(wanted, stacked_parameters(model))
    stored = {item: item_arrays(folder / item) for item in plan}
    on_disk = {item: with_scales(plan[item], stored[item]) for item in plan}
    compare_names(_flat(on_disk), _flat(stored), folder)
    digests = read_json(folder / DIGESTS)
    first = stored.get(REST, {}) | stored.get(block_name(0), {})
    dtypes = {name: read_dtype(x.dtype) for name, x in first.items()}
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in wanted.items()
    }
    together = {item: groups(plan[item]) for item in plan}
    held: dict[tuple[str, str], np.ndarray] = {}  # of the item and the group read last

    def read(name: str, layer: int | None) -> np.ndarray:
        item = REST if layer is None else block_name(layer)
        if (item, name) not in held:
            held.clear()  # before the next ones come
            some = next(group for group in together[item] if name in group)
            some = with_scales(some, stored[item])
            values = read_some(folder / item, some, stored[item])
            check_digests(values, digests.get(item, {}), folder / item)
            values = dequantise(values, dtypes)
            held.update({(item, n): np.asarray(x) for n, x in values.items()})
        return held[item, name]

    return StoredParameters(arrays, read)


def _flat(items: dict[str, Arrays]) -> Arrays:
    return {f"{item}/{name}": x for item in items for name, x in items[item].items()}
