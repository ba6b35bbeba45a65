"""Models and training states on disk: Orbax behind one door.

A module is described by plain JSON (class, config fields, branches) and its parameters
by a flat dict from dotted names to arrays. One folder holds one module:

    config.json    format, class, config, branches; what `build_model` needs
    digests.json   crc32 of every item
    arrays/        Orbax; a stacked parameter is stored as one item for each layer

A bundle is a folder of such folders (`transformer/`, `vae/`, ...) with `text.npy`, the
prompt's features. A training workdir holds `base/` (a bundle: what does not change),
`checkpoints/STEP/` and at the end `model/` (a bundle). Everything is written under
another name and renamed, so what has its name is whole.

Orbax has no checksum over array data: of twelve flipped bits twelve were restored
silently. Hence the digests, which every load verifies.
"""

import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from cityrag_jax.parallel import param_shardings

FORMAT = 1
_MODELS = "cityrag_jax.model."

Arrays = dict[str, Any]  # dotted name -> array or jax.ShapeDtypeStruct
Description = dict[str, Any]


# --------------------------------------------------------------------------------------
# Modules and their parameters
# --------------------------------------------------------------------------------------


def parameters(model: nnx.Module) -> Arrays:
    """Give the parameters by dotted name, such as `blocks.ffn.fc1.kernel`."""
    return {name: v.get_value() for name, v in _variables(model).items()}


def with_parameters(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """Give a module like `model`, which may be abstract, with these parameters."""
    structure, state, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "every array of a model is an nnx.Param"
    flat = [
        (path, v.replace(values[_name(path)])) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(structure, nnx.from_flat_state(flat), rest)


def stacked_parameters(model: nnx.Module) -> frozenset[str]:
    """Name the parameters with a leading layer axis: one more than their `axes`."""
    return frozenset(
        name
        for name, v in _variables(model).items()
        if len(v.get_metadata().get("axes") or v.shape) < len(v.shape)
    )


def parameter_shardings(model: nnx.Module, mesh: Mesh | None) -> dict[str, Sharding]:
    """Give the sharding of every parameter; without a mesh, the first device."""
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(_variables(model), here)
    state = param_shardings(nnx.state(model, nnx.Param), mesh)
    return {_name(path): v.get_value() for path, v in nnx.to_flat_state(state)}


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    return {
        _name(path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


# --------------------------------------------------------------------------------------
# Descriptions
# --------------------------------------------------------------------------------------


def describe(
    model_class: type, config: Any, branches: tuple[tuple[type, dict], ...] = ()
) -> Description:
    """Describe a module so that `build_model` can make it again.

    `config` is its frozen dataclass; a branch is its class and its keyword arguments
    behind the transformer's config.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        "class": _class_name(model_class),
        "config_class": _class_name(type(config)),
        "config": {name: _to_json(name, value) for name, value in fields.items()},
        "branches": [
            {"class": _class_name(branch), "arguments": dict(arguments)}
            for branch, arguments in branches
        ],
    }


def build_model(
    description: Description, rngs: nnx.Rngs, dtype: DTypeLike | None = None
) -> nnx.Module:
    """Build the described module; `dtype` replaces both types of its config."""
    config = read_config(description)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    branches = tuple(
        _find_class(branch["class"])(config, **branch["arguments"], rngs=rngs)
        for branch in description["branches"]
    )
    extra = {"branches": branches} if branches else {}
    return _find_class(description["class"])(config, **extra, rngs=rngs)


def read_config(description: Description) -> Any:
    """Give the config dataclass that stands in a description."""
    fields = {k: _from_json(k, v) for k, v in description["config"].items()}
    return _find_class(description["config_class"])(**fields)


def abstract_model(
    description: Description, dtype: DTypeLike | None = None
) -> nnx.Module:
    """Build the described module without allocating anything."""
    return nnx.eval_shape(lambda: build_model(description, nnx.Rngs(0), dtype))


def new_model(description: Description, seed: int) -> nnx.Module:
    """Build the described module, drawn under jit: much faster than op by op."""
    values = draw_parameters(description, seed)
    return with_parameters(abstract_model(description), values)


def draw_parameters(
    description: Description, seed: int, shardings: Mapping[str, Sharding] | None = None
) -> Arrays:
    """Draw the parameters of a new module, each onto its shards."""

    def draw():
        return parameters(build_model(description, nnx.Rngs(seed)))

    return jax.jit(draw, out_shardings=shardings and dict(shardings))()


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _find_class(name: str) -> type:
    """Import a class of `cityrag_jax.model` by name; a folder may name no other."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith(_MODELS) or not attribute.isidentifier():
        raise ValueError(
            f"config.json names the class {name}; only classes under {_MODELS}* are "
            "built. Is this folder a checkpoint of cityrag_jax?"
        )
    return getattr(importlib.import_module(module), attribute)


def _to_json(name: str, value: Any) -> Any:
    return jnp.dtype(value).name if name.endswith("dtype") else value


def _from_json(name: str, value: Any) -> Any:
    if name.endswith("dtype"):
        return jnp.dtype(value)
    return tuple(value) if isinstance(value, list) else value


# --------------------------------------------------------------------------------------
# Items: what Orbax sees, one for each layer of a stacked array
# --------------------------------------------------------------------------------------


@jax.jit
def _unstack(x: jax.Array) -> list[jax.Array]:
    return [x[i] for i in range(x.shape[0])]


@functools.cache
def _stack_onto(sharding: Sharding):
    return jax.jit(lambda layers: jnp.stack(layers), out_shardings=sharding)


def _layer_names(name: str, count: int) -> list[str]:
    return [f"{name}@{i:03}" for i in range(count)]


def _to_items(arrays: Mapping[str, Any], stacked: frozenset[str]) -> Arrays:
    items = {}
    for name, x in arrays.items():
        if _is_stacked(name, stacked):
            names = _layer_names(name, x.shape[0])
            items |= zip(names, _unstack(x), strict=True)
        else:
            items[name] = x
    return items


def _is_stacked(name: str, stacked: frozenset[str]) -> bool:
    """Optimiser leaves are named `path/of/state/parameter.name`."""
    return name.rpartition("/")[2] in stacked


def _abstract_items(wanted: Mapping[str, Any], stacked: frozenset[str]) -> Arrays:
    items = {}
    for name, x in wanted.items():
        if not _is_stacked(name, stacked):
            items[name] = x
            continue
        sharding = _layer_sharding(x.shape, x.sharding)
        layer = jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
        items |= dict.fromkeys(_layer_names(name, x.shape[0]), layer)
    return items


def _layer_sharding(shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    """Give one layer's sharding; what split the layers splits the next axis."""
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


def _from_items(
    items: Arrays, wanted: Mapping[str, Any], stacked: frozenset[str]
) -> Arrays:
    """Stack the layers on the devices and cast to the wanted types."""
    arrays = {}
    for name, x in wanted.items():
        if _is_stacked(name, stacked):
            layers = [items.pop(n) for n in _layer_names(name, x.shape[0])]
            value = _stack_onto(x.sharding)([layer.astype(x.dtype) for layer in layers])
        else:
            value = items.pop(name).astype(x.dtype)
        assert value.sharding.is_equivalent_to(x.sharding, value.ndim), name
        arrays[name] = value
    return arrays


def _digests(items: Arrays) -> dict[str, int]:
    return {name: _crc32(x) for name, x in items.items()}


def _crc32(x: Any) -> int:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    flat = np.ascontiguousarray(jax.device_get(x)).reshape(-1)
    return zlib.crc32(flat.view(np.uint8).data)


def _verify(items: Arrays, digests: Mapping[str, int], path: Path) -> None:
    broken = [name for name, x in items.items() if _crc32(x) != digests.get(name)]
    if broken:
        raise ValueError(
            f"{path} is damaged: the checksum of {len(broken)} of {len(items)} arrays "
            f"differs from the one stored ({_some(broken)}). Delete this folder and "
            "take an older checkpoint or another copy."
        )


def _compare(wanted: Arrays, stored: Mapping[str, Any], path: Path) -> None:
    """Raise once with every name and shape that differs."""
    lines = [f"missing in the checkpoint: {n}" for n in wanted if n not in stored]
    lines += [f"unknown to the model: {n}" for n in stored if n not in wanted]
    lines += [
        f"{n}: stored {tuple(stored[n].shape)}, the model has {tuple(x.shape)}"
        for n, x in wanted.items()
        if n in stored and tuple(stored[n].shape) != tuple(x.shape)
    ]
    # One line stands for all layers of a stack.
    lines = list(dict.fromkeys(re.sub(r"@\d+", "", line) for line in lines))
    if lines:
        shown = "\n  ".join(lines[:40] + ["..."] * (len(lines) > 40))
        raise ValueError(
            f"{path} does not fit the model ({len(lines)} differences):\n  {shown}\n"
            "Use the config that it was made with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_items(path: Path, wanted: Arrays, stacked: frozenset[str]) -> Arrays:
    """Read `wanted` (shape, type, sharding); digests are the caller's business."""
    stored = ocp.metadata(path).metadata
    wanted = _abstract_items(wanted, stacked)
    _compare(wanted, stored, path)
    # Read in the stored type: Orbax would cast silently and the digest would not fit.
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, stored[name].dtype, sharding=x.sharding)
        for name, x in wanted.items()
    }
    return ocp.load(path, abstract)


# --------------------------------------------------------------------------------------
# Model folders
# --------------------------------------------------------------------------------------


def save_model(
    path: Path | str,
    model: nnx.Module,
    description: Description | None = None,
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a module to a new folder; `dtype` casts the stored parameters.

    Without branches the description is read off the module and its `config`.
    """
    if description is None:
        description = describe(type(model), model.config)
    with _renamed(Path(path), overwrite) as folder:
        _write_model(folder, model, description, dtype)
    return Path(path)


def load_model(
    path: Path | str, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> nnx.Module:
    """Read a module that `save_model` wrote, onto the mesh or the first device.

    `dtype` is the type of parameters and arithmetic; None takes the config's.
    """
    path = Path(path).absolute()
    description = read_description(path)
    model = abstract_model(description, dtype)
    shapes, shardings = parameters(model), parameter_shardings(model, mesh)
    wanted = {n: _abstract(x, shardings[n]) for n, x in shapes.items()}
    stacked = stacked_parameters(model)
    items = _read_items(path / "arrays", wanted, stacked)
    _verify(items, _read_json(path / "digests.json"), path)
    return with_parameters(model, _from_items(items, wanted, stacked))


def read_description(path: Path | str) -> Description:
    """Read what a model folder says about its module."""
    description = _read_json(Path(path) / "config.json")
    if description.get("format") != FORMAT or "class" not in description:
        raise ValueError(
            f"{path}/config.json has format {description.get('format')} and describes "
            f"{sorted(description)}; this code reads model folders of format {FORMAT}. "
            "Convert the checkpoint with tools/convert_wan.py."
        )
    return description


def _write_model(folder, model, description, dtype):
    values = parameters(model)
    if dtype is not None:
        values = {n: x.astype(dtype) for n, x in values.items()}
    items = _to_items(values, stacked_parameters(model))
    folder.mkdir(parents=True)
    ocp.save(folder / "arrays", items)
    _write_json(folder / "digests.json", _digests(items))
    _write_json(folder / "config.json", {"format": FORMAT} | description)


def _abstract(x: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Modules that belong together, the features of their prompt, and their origin."""

    modules: dict[str, nnx.Module]
    descriptions: dict[str, Description]
    text: np.ndarray | None = None
    origin: str = "new"


def save_bundle(
    path: Path | str,
    bundle: Bundle,
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write modules and text features as one folder that appears all at once.

    A description without a module is written too (as `NAME.json`): `base/` of a workdir
    so keeps what the network is whose parameters stand in `checkpoints/`.
    """
    with _renamed(Path(path), overwrite) as folder:
        folder.mkdir(parents=True)
        for name, description in bundle.descriptions.items():
            if name in bundle.modules:
                _write_model(folder / name, bundle.modules[name], description, dtype)
            else:
                _write_json(folder / f"{name}.json", {"format": FORMAT} | description)
        if bundle.text is not None:
            np.save(folder / "text.npy", bundle.text)
        contents = {"format": FORMAT, "parts": sorted(bundle.descriptions)}
        if bundle.text is not None:
            contents["text_crc32"] = _crc32(bundle.text)
        _write_json(folder / "bundle.json", contents)
    return Path(path)


def load_bundle(
    path: Path | str, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Bundle:
    """Read what `save_bundle` wrote."""
    path = Path(path).absolute()
    contents = _read_json(path / "bundle.json")
    modules, descriptions = {}, {}
    for name in contents["parts"]:
        if (path / name).is_dir():
            modules[name] = load_model(path / name, dtype=dtype, mesh=mesh)
            descriptions[name] = read_description(path / name)
        else:
            descriptions[name] = _read_json(path / f"{name}.json")
    text = None
    if "text_crc32" in contents:
        text = np.load(path / "text.npy", allow_pickle=False)
        _verify({"text": text}, {"text": contents["text_crc32"]}, path)
    return Bundle(modules, descriptions, text, str(path))


def latest_model(
    path: Path | str, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Bundle:
    """Read the newest model of a workdir, a bundle or a single module's folder.

    Of a workdir, `model/` if training has ended, else the newest whole checkpoint, its
    averaged (EMA) parameters if there are any.
    """
    path = Path(path).absolute()
    kinds = dict(dtype=dtype, mesh=mesh)
    if (path / "bundle.json").exists():
        return load_bundle(path, **kinds)
    if (path / "model" / "bundle.json").exists():
        return load_bundle(path / "model", **kinds)
    if (path / "config.json").exists() and (path / "arrays").is_dir():
        description = read_description(path)
        name = "vae" if description["class"].endswith("VAE") else "transformer"
        model = load_model(path, **kinds)
        return Bundle({name: model}, {name: description}, None, str(path))
    if (path / "base").is_dir():
        with TrainingCheckpoints(path / "checkpoints") as checkpoints:
            return checkpoints.load_model(load_bundle(path / "base", **kinds), **kinds)
    raise ValueError(
        f"{path} holds no model: neither bundle.json, model/, config.json nor base/. "
        "Give a training workdir or a folder made by tools/convert_wan.py."
    )


# --------------------------------------------------------------------------------------
# Training checkpoints
# --------------------------------------------------------------------------------------


class TrainingCheckpoints:
    """Checkpoints of one training in a folder, one folder for each step.

    A checkpoint is some groups of arrays (`params`, `ema`, `optimizer`, ...) and notes
    (plain JSON). Saving copies to the host, then writes in the background; a checkpoint
    exists once it is renamed to its step. A process killed before that leaves a
    temporary folder, which is ignored and cleaned by the next trainer.
    """

    def __init__(
        self, folder: Path | str, *, keep: int | None = None, writable: bool = False
    ):
        self.folder = Path(folder).absolute()
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=(
                ocp.training.save_decision_policies.FixedIntervalPolicy(1)
            ),
            preservation_policy=policies.LatestN(keep) if keep else None,
            cleanup_tmp_directories=writable,
        )
        self._pending: ocp.AsyncResponse | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
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

        Waits for the save before, and raises what went wrong with it.
        """
        self.wait()
        items = {g: _to_items(_flatten(tree), stacked) for g, tree in groups.items()}
        digests = {group: _digests(arrays) for group, arrays in items.items()}
        text = json.dumps({"format": FORMAT, "digests": digests, "notes": dict(notes)})
        nonempty = {group: arrays for group, arrays in items.items() if arrays}
        self._pending = self._checkpointer.save_checkpointables_async(
            step, nonempty | {"notes": {"json": text}}
        )

    def restore(
        self,
        wanted: Mapping[str, PyTree],
        stacked: frozenset[str] = frozenset(),
        step: int | None = None,
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Read groups as their abstract arrays say, and the notes, of the newest step.

        Raises ValueError if names or shapes differ or a checksum does not fit.
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
                _verify(items, record["digests"].get(group, {}), path)
                arrays = _from_items(items, flat, stacked)
            structure = jax.tree.structure(tree)
            result[group] = jax.tree.unflatten(structure, list(arrays.values()))
        return result, record["notes"]

    def read_notes(self, step: int | None = None) -> dict[str, Any]:
        """Read the notes alone."""
        return self._read_record(self._newest() if step is None else step)["notes"]

    def load_model(
        self, base: Bundle, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
    ) -> Bundle:
        """Put the newest (averaged) parameters into the module described in `base`."""
        step = self._newest()
        record = self._read_record(step)
        group = "ema" if record["digests"].get("ema") else "params"
        name = record["notes"]["part"]
        description = base.descriptions[name]
        model = abstract_model(description, dtype)
        shapes, shardings = parameters(model), parameter_shardings(model, mesh)
        wanted = {n: _abstract(x, shardings[n]) for n, x in shapes.items()}
        groups, _ = self.restore({group: wanted}, stacked_parameters(model), step)
        modules = base.modules | {name: with_parameters(model, groups[group])}
        origin = f"{self.folder / str(step)} ({group})"
        return dataclasses.replace(base, modules=modules, origin=origin)

    def wait(self) -> None:
        """Wait until the last save is whole; raise if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

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
        loaded = ocp.load_checkpointables(path, {"notes": None})
        return json.loads(loaded["notes"]["json"])


def _read_group(path, group, flat, stacked):
    stored = ocp.checkpointables_metadata(path).metadata
    if group not in stored:
        raise ValueError(
            f"{path} has no group {group!r}, only {sorted(stored)}; it was written by "
            "another configuration."
        )
    wanted = _abstract_items(flat, stacked)
    _compare(wanted, stored[group], path / group)
    abstract = {
        n: jax.ShapeDtypeStruct(x.shape, stored[group][n].dtype, sharding=x.sharding)
        for n, x in wanted.items()
    }
    return ocp.load_checkpointables(path, {group: abstract})[group]


def _flatten(tree: PyTree) -> Arrays:
    """Flatten in the tree's own order; names are paths joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): leaf for path, leaf in leaves}


# --------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------


class _renamed:
    """Context: write to a temporary sibling of `path`, renamed when all went well."""

    def __init__(self, path: Path, overwrite: bool):
        self.path = path.absolute()
        self.overwrite = overwrite
        self.temporary = self.path.with_name(f".{path.name}.tmp-{os.getpid()}")

    def __enter__(self) -> Path:
        if self.path.exists() and not self.overwrite:
            raise ValueError(f"{self.path} exists; delete it or choose another name.")
        shutil.rmtree(self.temporary, ignore_errors=True)
        return self.temporary

    def __exit__(self, kind, *_):
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        replaced = self.temporary.with_suffix(".replaced")
        if self.path.exists():
            os.rename(self.path, replaced)
        os.rename(self.temporary, self.path)
        shutil.rmtree(replaced, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} does not exist; is {path.parent} a model folder?")
    return json.loads(path.read_text())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
