"""Training checkpoints, and the newest model wherever it stands.

A training workdir holds `base/` (a bundle: what does not change, with the frozen
parameters of the trained module in `base/frozen/`), `checkpoints/STEP/` and at the end
`model/` (a bundle). A checkpoint is some groups of arrays, each one Orbax folder in
which a stacked array is one entry for each layer (`name@000`), and notes. Every restore
verifies the digests.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from cityrag_jax.checkpoint.bundles import (
    DIGEST,
    FORMAT,
    Bundle,
    Modules,
    abstract_parameters,
    identify_bundle,
    is_bundle,
    load_bundle,
    within,
)
from cityrag_jax.checkpoint.descriptions import (
    Arrays,
    abstract_model,
    parameter_shardings,
    stacked_parameters,
    with_parameters,
    with_statistics,
)
from cityrag_jax.checkpoint.digests import (
    check_digests,
    compare_names,
    digest_json,
    sum_arrays,
    unreadable,
)
from cityrag_jax.checkpoint.disks import CAUSES, describe_cause, find_cause
from cityrag_jax.checkpoint.files import read_json, renamed
from cityrag_jax.checkpoint.items import (
    DIGESTS,
    abstract_layer,
    is_stacked,
    read_arrays,
    write_arrays,
)
from cityrag_jax.checkpoint.quantise import held_in_int8, hold
from cityrag_jax.parallel import on_writer

FROZEN = Path("base", "frozen")


def latest_model(
    path: Path | str,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    verify: bool | None = None,
    int8: Collection[str] = (),
) -> Bundle:
    """Open the newest model of a bundle or a workdir; modules are read when asked for.

    Of a workdir, `model/` if training has ended, else the newest whole checkpoint, its
    averaged (EMA) parameters if there are any. `dtype` is the type of parameters and
    arithmetic, None the config's; without a mesh all lies on the first device. `int8`
    and how digests are checked are as `load_bundle` says.
    """
    path = Path(path).absolute()
    kinds = dict(dtype=dtype, mesh=mesh, int8=int8)
    for folder in (path, path / "model"):
        if is_bundle(folder):
            return load_bundle(folder, verify=verify, **kinds)
    if is_bundle(path / "base"):
        base = load_bundle(path / "base", verify=verify, **kinds)
        with TrainingCheckpoints(path / "checkpoints") as checkpoints:
            return checkpoints.load_model(base, path / FROZEN, **kinds)
    raise ValueError(
        f"{path} holds no model: neither its config.json nor those of model/ and base/ "
        f"list modules in format {FORMAT}. Give a training workdir or a folder made by "
        "tools/convert_wan.py."
    )


def identify_model(path: Path | str) -> str:
    """Give a digest of the weights that `latest_model` opens, none of them read.

    It is made of the digests that are stored beside them.
    """
    path = Path(path).absolute()
    for folder in (path, path / "model"):
        if is_bundle(folder):
            return identify_bundle(folder)
    if not is_bundle(path / "base"):
        latest_model(path)  # raises what there is to say
    with TrainingCheckpoints(path / "checkpoints") as checkpoints:
        digests = [identify_bundle(path / "base"), checkpoints.read_digests()]
    if (path / FROZEN).exists():
        digests.append(read_json(path / FROZEN / DIGESTS))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def save_frozen(workdir: Path, frozen: Arrays, stacked: frozenset[str]) -> None:
    """Write the parameters that a training leaves as they are, if there are any."""
    if frozen:
        with renamed(workdir / FROZEN, overwrite=True) as folder:
            write_arrays(folder, frozen, stacked)


def load_frozen(workdir: Path, wanted: Arrays, stacked: frozenset[str]) -> Arrays:
    """Read what `save_frozen` wrote as the abstract arrays say; digests are checked."""
    if not wanted:
        return {}
    return read_arrays(workdir / FROZEN, wanted, stacked, verify=True)


class TrainingCheckpoints:
    """Checkpoints of one training in a folder, one folder for each step.

    A checkpoint is some groups of arrays (`params`, `ema`, `optimizer`, ...) and notes
    (plain JSON). Saving copies to the host, then writes in the background; a checkpoint
    exists once it is renamed to its step. A process killed before that leaves a
    temporary folder, which is ignored and cleaned by the next trainer.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep: int | None = None,
        keep_every: int = 0,
        writable: bool = False,
    ):
        """Open the folder; the newest `keep` stay and, of `keep_every` steps, one."""
        self.folder = Path(folder).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=(
                ocp.training.save_decision_policies.FixedIntervalPolicy(1)
            ),
            preservation_policy=_preserve(keep, keep_every) if keep else None,
            cleanup_tmp_directories=writable,
        )
        self._pending: Future | None = None
        self._pending_step = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # of what ends the training, one is enough
            self.close()

    @property
    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(
        self,
        step: int,
        groups: Mapping[str, PyTree],
        notes: Mapping[str, Any],
        stacked: frozenset[str] = frozenset(),
    ) -> None:
        """Start to save; the arrays may be donated as soon as this returns.

        Waits for the save before. Raises ValueError if that or this one cannot be
        written.
        """
        self.wait()
        items, digests = {}, {}
        for group, tree in groups.items():
            items[group], digests[group] = _to_host(_flatten(tree), stacked)
        record = {"format": FORMAT, "digests": digests, "notes": dict(notes)}
        text = json.dumps(record | {DIGEST: digest_json(record)})
        nonempty = {group: arrays for group, arrays in items.items() if arrays}
        self._pending_step = step
        if not self.folder.is_dir():  # Orbax would make it anew, without the others
            raise self._not_written(
                OSError(f"No such file or directory: {self.folder}")
            )
        try:
            saving = self._checkpointer.save_checkpointables_async(
                step, nonempty | {"notes": {"json": text}}
            )
        except Exception as error:  # Orbax and tensorstore raise many kinds
            raise self._not_written(error) from error
        worker = ThreadPoolExecutor(1)
        self._pending = worker.submit(saving.result)
        worker.shutdown(wait=False)

    def restore(
        self,
        wanted: Mapping[str, PyTree],
        stacked: frozenset[str] = frozenset(),
        step: int | None = None,
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Read groups as their abstract arrays say, and the notes, of the newest step.

        Raises ValueError if names or shapes differ, `Damaged` if a checksum does not
        fit or a file cannot be read.
        """
        step = self._newest() if step is None else step
        path = self.folder / str(step)
        record = self._read_record(step)
        result = {}
        for group, tree in wanted.items():
            flat = _flatten(tree)
            arrays = {}
            if flat:
                items = _read_group(path, group, flat, stacked)
                check_digests(items, record["digests"].get(group, {}), path)
                arrays = _from_items(items, flat, stacked)
            structure = jax.tree.structure(tree)
            result[group] = jax.tree.unflatten(structure, list(arrays.values()))
        return result, record["notes"]

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint that cannot be used beside the folder; say where it is."""
        path = self.folder.parent / f"damaged-{step}"
        number = 1
        while path.exists():
            number += 1
            path = self.folder.parent / f"damaged-{step}-{number}"
        on_writer(lambda: (self.folder / str(step)).rename(path))
        self._checkpointer.reload()
        return path

    def read_notes(self, step: int | None = None) -> dict[str, Any]:
        """Read the notes alone."""
        return self._read_record(self._newest() if step is None else step)["notes"]

    def read_digests(self) -> dict[str, Any]:
        """Read the digests of the newest checkpoint's arrays."""
        return self._read_record(self._newest())["digests"]

    def load_model(
        self,
        base: Bundle,
        frozen: Path,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        int8: Collection[str] = (),
    ) -> Bundle:
        """Put the newest (averaged) parameters into the module described in `base`.

        Those that no checkpoint holds are read from the folder `frozen`, if it exists.
        """
        step = self._newest()
        record = self._read_record(step)
        group = "ema" if record["digests"].get("ema") else "params"
        trained = {item.partition("@")[0] for item in record["digests"][group]}
        name = record["notes"]["part"]

        def read() -> nnx.Module:
            model = abstract_model(base.descriptions[name], dtype)
            wanted = abstract_parameters(model, parameter_shardings(model, mesh))
            stacked, values = stacked_parameters(model), {}
            held = functools.partial(
                held_in_int8, stacked=stacked, patterns=within(name, int8)
            )
            if frozen.exists():
                others = {n: wanted.pop(n) for n in wanted.keys() - trained}
                values = read_arrays(frozen, held(others), stacked, verify=True)
            with TrainingCheckpoints(self.folder) as checkpoints:
                groups, _ = checkpoints.restore({group: wanted}, stacked, step)
            values |= hold(groups[group], held(wanted))
            return with_statistics(with_parameters(model, values), mesh)

        return dataclasses.replace(
            base,
            modules=Modules.of(base.modules) | Modules({name: read}),
            origin=f"{self.folder / str(step)} ({group})",
        )

    def check(self) -> None:
        """Raise ValueError if the last save has failed; do not wait for it."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is whole; raise ValueError if it failed."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:  # Orbax and tensorstore raise many kinds
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> ValueError:
        step = self._pending_step
        older = [s for s in _whole_steps(self.folder) if s != step]
        rest = f"step {older[-1]} is whole" if older else "there is none before it"
        cure = CAUSES.get(find_cause(error), "Look at the disk")
        cure += ", or lower config.train.keep" if "space" in cure else ""
        return ValueError(
            f"{self.folder}: the checkpoint of step {step} could not be written "
            f"({describe_cause(error)}); {rest}. {cure}, then the same command goes on."
        )

    def close(self) -> None:
        """Wait, then free threads."""
        self.wait()
        self._checkpointer.close()

    def _newest(self) -> int:
        if not self.steps:
            raise ValueError(
                f"{self.folder} holds no checkpoint yet; train longer or lower "
                "config.train.checkpoint_interval."
            )
        return self.steps[-1]

    def _read_record(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step)
        try:
            loaded = ocp.load_checkpointables(path, {"notes": None})
            record = json.loads(loaded["notes"]["json"])
        except Exception as error:  # Orbax and tensorstore raise many kinds
            raise unreadable(path / "notes", error) from error
        digest = record.pop(DIGEST, None)
        if digest != digest_json(record):
            raise unreadable(path / "notes", ValueError("its checksum does not fit"))
        return record


def _preserve(keep: int, every: int):
    policies = ocp.training.preservation_policies
    newest = policies.LatestN(keep)
    if not every:
        return newest
    return policies.AnyPreservationPolicy([newest, policies.EveryNSteps(every)])


def _whole_steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def _read_group(path, group, flat, stacked):
    try:
        stored = ocp.checkpointables_metadata(path).metadata
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise unreadable(path, error) from error
    if group not in stored:
        raise ValueError(
            f"{path} has no group {group!r}, only {sorted(stored)}; it was written by "
            "another configuration."
        )
    if stored[group] is None:
        raise unreadable(path / group, ValueError("no metadata"))
    wanted = _abstract_items(flat, stacked)
    compare_names(wanted, stored[group], path / group)
    abstract = {
        n: jax.ShapeDtypeStruct(x.shape, stored[group][n].dtype, sharding=x.sharding)
        for n, x in wanted.items()
    }
    try:
        return ocp.load_checkpointables(path, {group: abstract})[group]
    except Exception as error:
        raise unreadable(path / group, error) from error


def _flatten(tree: PyTree) -> Arrays:
    """Flatten in the tree's own order; names are paths joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): leaf for path, leaf in leaves}


@functools.cache
def _unstack_onto(layer: Sharding, count: int):
    """Jit the cutting of a stack into layers, each on shards of its own.

    Left to the compiler, what is split over the layers would be copied to all devices.
    """
    return jax.jit(
        lambda x: [x[i] for i in range(count)], out_shardings=[layer] * count
    )


@functools.cache
def _stack_onto(sharding: Sharding):
    return jax.jit(lambda layers: jnp.stack(layers), out_shardings=sharding)


def _layer_names(name: str, count: int) -> list[str]:
    return [f"{name}@{i:03}" for i in range(count)]


def _to_items(arrays: Mapping[str, Any], stacked: frozenset[str]) -> Arrays:
    items = {}
    for name, x in arrays.items():
        if is_stacked(name, stacked):
            names = _layer_names(name, x.shape[0])
            layer = abstract_layer(x).sharding
            items |= zip(names, _unstack_onto(layer, len(x))(x), strict=True)
        else:
            items[name] = x
    return items


def _to_host(
    arrays: Mapping[str, Any], stacked: frozenset[str]
) -> tuple[Arrays, dict[str, int]]:
    """Copy arrays to the host as items, each shard by itself, and give their sums.

    One after another: beside the state, the devices have room for the layers of one
    parameter, not for another state.
    """
    kept, digests = {}, {}

    def copy(items):
        digests.update(sum_arrays(items))
        kinds = {
            n: x.sharding.with_memory_kind("pinned_host") for n, x in items.items()
        }
        return jax.block_until_ready(jax.device_put(items, kinds))

    for name, x in arrays.items():
        kept |= copy(_to_items({name: x}, stacked))
    return kept, digests


def _abstract_items(wanted: Mapping[str, Any], stacked: frozenset[str]) -> Arrays:
    items = {}
    for name, x in wanted.items():
        if not is_stacked(name, stacked):
            items[name] = x
            continue
        items |= dict.fromkeys(_layer_names(name, x.shape[0]), abstract_layer(x))
    return items


def _from_items(
    items: Arrays, wanted: Mapping[str, Any], stacked: frozenset[str]
) -> Arrays:
    """Stack the layers on the devices and cast to the wanted types."""
    arrays = {}
    for name, x in wanted.items():
        if is_stacked(name, stacked):
            layers = [items.pop(n) for n in _layer_names(name, x.shape[0])]
            value = _stack_onto(x.sharding)([layer.astype(x.dtype) for layer in layers])
        else:
            value = items.pop(name).astype(x.dtype)
        assert value.sharding.is_equivalent_to(x.sharding, value.ndim), name
        arrays[name] = value
    return arrays
