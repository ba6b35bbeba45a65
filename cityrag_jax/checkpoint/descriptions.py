"""Modules as plain JSON, and their parameters as a flat dict by dotted name.

A description is class, config fields, branches and adapters of a module: what
`build_model` needs to make it again. A parameter is stacked if it has a leading layer
axis.
"""

import dataclasses
import importlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jax.typing import DTypeLike

from cityrag_jax.int8 import Int8Kernel, scale_of
from cityrag_jax.parallel import param_shardings

# In the place of a type to read a model in: linears in the one that they compute in,
# all else as described. What was trained in float32 and computes in bfloat16 so takes
# half of the memory and gives the same bits: a linear casts its parameters anyway.
COMPUTING = "computing"
_MODELS = "cityrag_jax.model."

Arrays = dict[str, Any]  # dotted name -> array or jax.ShapeDtypeStruct
Description = dict[str, Any]


def parameters(model: nnx.Module) -> Arrays:
    """Give the parameters by dotted name, such as `blocks.ffn.fc1.kernel`.

    What is held as int8 is two arrays: its scales have a name of their own.
    """
    found = {}
    for name, variable in _variables(model).items():
        value = variable.get_value()
        if isinstance(value, Int8Kernel):
            found[name], found[scale_of(name)] = value
        else:
            found[name] = value
    return found


def with_parameters(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """Give a module like `model`, which may be abstract, with these parameters."""
    structure, state, rest = nnx.split(model, nnx.Param, ...)

    def value(name: str) -> Any:
        scale = values.get(scale_of(name))
        return values[name] if scale is None else Int8Kernel(values[name], scale)

    flat = [
        (path, v.replace(value(_name(path)))) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(structure, nnx.from_flat_state(flat), rest)


def with_statistics(
    model: nnx.Module, mesh: Mesh | None, *, abstract: bool = False
) -> nnx.Module:
    """Give the module itself; what it knows by measurement it holds as arrays now.

    Whole on every device of the mesh, or on the first device.
    """
    if hasattr(model, "hold_statistics"):
        place = _first_device()
        if mesh is not None:
            place = NamedSharding(mesh, PartitionSpec())
        model.hold_statistics(place, abstract=abstract)
    return model


def stacked_parameters(model: nnx.Module) -> frozenset[str]:
    """Name the parameters with a leading layer axis: one more than their `axes`."""
    return frozenset(
        name
        for name, v in _variables(model).items()
        if len(v.get_metadata().get("axes") or v.shape) < len(v.get_value().shape)
    )


def parameter_shardings(model: nnx.Module, mesh: Mesh | None) -> dict[str, Sharding]:
    """Give the sharding of every parameter; without a mesh, the first device."""
    if mesh is None:
        return dict.fromkeys(_variables(model), _first_device())
    state = param_shardings(nnx.state(model, nnx.Param), mesh)
    return {_name(path): v.get_value() for path, v in nnx.to_flat_state(state)}


def _first_device() -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    return {
        _name(path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


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


def with_adapters(
    description: Description, add: Callable[..., None], **arguments: Any
) -> Description:
    """Describe the same module with adapters, behind those that it has already.

    `add` is a function of `cityrag_jax.model` that gives a module its adapters, and
    `arguments` are its keywords behind the module, plain JSON.
    """
    new = {"class": _class_name(add), "arguments": arguments}
    return description | {"adapters": [*description.get("adapters", []), new]}


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
    model = _find_class(description["class"])(config, **extra, rngs=rngs)
    for adapters in description.get("adapters", []):
        _find_class(adapters["class"])(model, **adapters["arguments"], rngs=rngs)
    return model


def read_config(description: Description) -> Any:
    """Give the config dataclass that stands in a description."""
    fields = {k: _from_json(k, v) for k, v in description["config"].items()}
    return _find_class(description["config_class"])(**fields)


def check_description(description: Any, where: str) -> None:
    """Raise ValueError if something is no description, naming the key and the value.

    What it says must be of the right types, and its classes must exist; if its sizes
    fit together is for the classes to say.
    """
    parts = {"class": str, "config_class": str, "config": dict, "branches": list}
    _check_keys(description, parts, where)
    cls = _find_class(description["config_class"])
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"{where}.config_class {cls.__name__} is no config.")
    _find_class(description["class"])
    kinds = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    for name, value in description["config"].items():
        if name not in known:
            raise ValueError(
                f"{where}.config has {name!r}, which {cls.__name__} has not; it knows "
                f"{', '.join(sorted(known))}."
            )
        if not _is_of(value, kinds[name], name):
            raise ValueError(
                f"{where}.config.{name} is {value!r}; it must be "
                f"{_kind_name(kinds[name])}."
            )
    for i, branch in enumerate(description["branches"]):
        _check_keys(branch, {"class": str, "arguments": dict}, f"{where}.branches[{i}]")
        _find_class(branch["class"])
    try:
        read_config(description)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}.config does not work: {error}") from error


def _check_keys(value: Any, parts: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, no JSON object.")
    for name, kind in parts.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(
                f"{where}.{name} is {value.get(name)!r}; it must be a {kind.__name__}."
            )


def _is_of(value: Any, kind: Any, name: str) -> bool:
    """Say if a JSON value can stand for a type of a config's field."""
    if name.endswith("dtype"):
        return value in ("float32", "bfloat16", "float16")
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            return False
        kinds = options[:1] * len(value) if options[-1] is ... else options
        pairs = zip(value, kinds, strict=False)
        return len(value) == len(kinds) and all(_is_of(x, k, "") for x, k in pairs)
    if options:  # a union
        return any(_is_of(value, option, "") for option in options)
    if kind is float:
        finite = isinstance(value, int | float) and abs(value) < float("inf")
        return finite and not isinstance(value, bool)
    if kind in (int, str, bool, type(None)):
        return type(value) is kind
    return True


def _kind_name(kind: Any) -> str:
    return (
        getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)
    )


def abstract_model(
    description: Description, dtype: DTypeLike | None = None
) -> nnx.Module:
    """Build the described module without allocating anything.

    `dtype` replaces both types of its config, or is `COMPUTING`.
    """
    computing = isinstance(dtype, str) and dtype == COMPUTING
    both = None if computing else dtype
    model = nnx.eval_shape(lambda: build_model(description, nnx.Rngs(0), both))
    if computing:
        for _, module in nnx.iter_modules(model):
            if _is_linear(module):
                for variable in (module.kernel, module.bias):
                    shape = variable.get_value().shape
                    variable.set_value(jax.ShapeDtypeStruct(shape, module.dtype))
    return model


def _is_linear(module: nnx.Module) -> bool:
    kernel = getattr(module, "kernel", None)
    return kernel is not None and len(kernel.get_metadata()["axes"]) == 2


def new_model(description: Description, seed: int) -> nnx.Module:
    """Build the described module, drawn under jit: much faster than op by op."""
    values = draw_parameters(description, seed)
    return with_parameters(abstract_model(description), values)


def draw_parameters(
    description: Description, seed: int, shardings: Mapping[str, Sharding] | None = None
) -> Arrays:
    """Draw the parameters of a new module; of `shardings`, those named, onto shards."""

    def draw():
        values = parameters(build_model(description, nnx.Rngs(seed)))
        return {n: x for n, x in values.items() if shardings is None or n in shardings}

    return jax.jit(draw, out_shardings=shardings and dict(shardings))()


def _class_name(cls: Callable) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _find_class(name: str) -> Callable:
    """Import a class of `cityrag_jax.model` by name; a folder may name no other."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith(_MODELS) or not attribute.isidentifier():
        raise ValueError(
            f"config.json names the class {name}; only classes under {_MODELS}* are "
            "built. Is this folder a checkpoint of cityrag_jax?"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"config.json names the class {name}, which this version has not. Use the "
            "version that wrote it."
        ) from error


def _to_json(name: str, value: Any) -> Any:
    return jnp.dtype(value).name if name.endswith("dtype") else value


def _from_json(name: str, value: Any) -> Any:
    if name.endswith("dtype"):
        return jnp.dtype(value)
    return tuple(value) if isinstance(value, list) else value
