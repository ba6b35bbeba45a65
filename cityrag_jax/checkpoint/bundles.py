"""Bundles: modules that belong together, in one folder that describes itself.

    config.json     format, descriptions of the modules, crc32 of the texts, versions,
                    source, licence, and the crc32 of all that
    text.npy        the fixed prompt's rows [S, E]; negative_text.npy the empty prompt's
    NAME/           a module: digests.json and a folder for each item (`items.py`)

Everything is written under another name and renamed, so what has its name is whole.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from cityrag_jax.checkpoint.descriptions import (
    Arrays,
    Description,
    abstract_model,
    check_description,
    parameter_shardings,
    parameters,
    stacked_parameters,
    with_parameters,
    with_statistics,
)
from cityrag_jax.checkpoint.digests import (
    check_digests,
    crc32,
    digest_json,
    first_line,
    trusted,
    unreadable,
)
from cityrag_jax.checkpoint.disks import writing
from cityrag_jax.checkpoint.files import read_json, renamed, write_json
from cityrag_jax.checkpoint.items import (
    DIGESTS,
    find_damage,
    read_arrays,
    write_arrays,
)
from cityrag_jax.checkpoint.quantise import held_in_int8
from cityrag_jax.parallel import is_writer

FORMAT = 2
CONFIG = "config.json"
DIGEST = "digest"  # of all else that stands in config.json
TEXTS = ("text", "negative_text")

Read = Callable[[], nnx.Module]
# Name -> module; not said so, for a type checker would read a module to look at it.
Named = Mapping[str, Any]


class Modules(Named):
    """Modules by name, each read when it is first asked for and then kept."""

    def __init__(self, readers: Mapping[str, Read]):
        self._readers = dict(readers)
        self._read: dict[str, nnx.Module] = {}

    def __getitem__(self, name: str) -> nnx.Module:
        if name not in self._read:
            self._read[name] = self._readers[name]()
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._readers  # a Mapping would read the module to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __or__(self, other: Named) -> "Modules":
        """Join without reading; on the same name the other's module wins."""
        return Modules(Modules.of(self)._readers | Modules.of(other)._readers)

    @classmethod
    def of(cls, modules: Named) -> "Modules":
        """View any mapping so, without reading."""
        get = modules.__getitem__
        return cls({name: functools.partial(get, name) for name in modules})


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Modules that belong together, the rows of their prompts, and their origin.

    `descriptions` may know modules that are not stored here. `source` says what the
    parameters were made from, by anyone's choice of keys.
    """

    modules: Named
    descriptions: dict[str, Description]
    text: np.ndarray | None = None
    origin: str = "new"
    negative_text: np.ndarray | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    licence: str = ""


def computing_in(bundle: Bundle, name: str, dtype: str) -> Bundle:
    """Give the bundle with a network that computes in `dtype`, "" as it is described.

    Its parameters stay what they are. Any type but float32 and bfloat16 is a
    ValueError.
    """
    if not dtype:
        return bundle
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"The {name} cannot compute in {dtype!r}; choose float32 or bfloat16, or "
            "nothing for what it is stored with."
        )
    told = bundle.descriptions[name]
    told = told | {"config": told["config"] | {"dtype": dtype}}

    def read():
        given = bundle.modules[name]
        made = with_parameters(abstract_model(told), parameters(given))
        held = getattr(given, "statistics", None)
        if held is not None:
            made.statistics = held
        return made

    return dataclasses.replace(
        bundle,
        modules=Modules.of(bundle.modules) | Modules({name: read}),
        descriptions=bundle.descriptions | {name: told},
    )


def save_bundle(
    path: Path | str,
    bundle: Bundle,
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a bundle as one folder that appears all at once; `dtype` casts parameters.

    "int8" stores kernels so, with a float32 scale for each of their output channels.
    Several processes save the same bundle together, each what its devices hold.
    A description without a module is written too, as `described`: `base/` of a workdir
    so keeps what the network is whose parameters stand in `checkpoints/`.
    """
    unknown = sorted(set(bundle.modules) - set(bundle.descriptions))
    if unknown:
        raise ValueError(
            f"The bundle has no description of {', '.join(unknown)}, only of "
            f"{sorted(bundle.descriptions)}; make one with `describe`."
        )
    with renamed(Path(path), overwrite) as folder:
        for name, module in bundle.modules.items():
            given = parameters(module), stacked_parameters(module), dtype
            with writing(Path(path)):
                write_arrays(folder / name, *given)
        if is_writer():
            write_texts(folder, bundle.text, bundle.negative_text)
            write_config(folder, bundle)
    return Path(path)


def write_config(folder: Path, bundle: Bundle) -> None:
    """Write config.json with its own digest."""
    told = bundle_config(bundle)
    write_json(folder / CONFIG, told | {DIGEST: digest_json(told)})


def bundle_config(bundle: Bundle) -> dict[str, Any]:
    """Give what config.json says about a bundle."""
    stored = {n: d for n, d in bundle.descriptions.items() if n in bundle.modules}
    described = {n: d for n, d in bundle.descriptions.items() if n not in stored}
    texts = {name: getattr(bundle, name) for name in TEXTS}
    packages = ("jax", "flax", "orbax-checkpoint", "numpy")
    return {
        "format": FORMAT,
        "modules": stored,
        "described": described,
        "texts": {name: crc32(x) for name, x in texts.items() if x is not None},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "source": dict(bundle.source),
        "licence": bundle.licence,
    }


def write_texts(
    folder: Path, text: np.ndarray | None, negative_text: np.ndarray | None
) -> None:
    """Write the prompts' rows that there are."""
    for name, rows in zip(TEXTS, (text, negative_text), strict=True):
        if rows is not None:
            np.save(folder / f"{name}.npy", rows)


def is_bundle(path: Path) -> bool:
    """Say whether a folder's config.json lists modules."""
    config = path / CONFIG
    return config.is_file() and "modules" in read_json(config)


def load_bundle(
    path: Path | str,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    verify: bool | None = None,
    int8: Collection[str] = (),
) -> Bundle:
    """Open what `save_bundle` wrote; modules are read when they are asked for.

    `dtype` is the type of parameters and arithmetic, None the config's; parameters lie
    on the mesh as `parallel.py` says, or on the first device. Stacked kernels stay int8
    in memory if `int8` has a pattern of their names, as in "transformer.blocks.*". A
    module's digests are checked as it is read unless disks are trusted (`trust`) or
    `verify` is False. Names and shapes always are.
    """
    path = Path(path).absolute()
    verify = not trusted() if verify is None else verify
    config = _read_config(path)
    kinds = dict(dtype=dtype, mesh=mesh, verify=verify, int8=int8)
    readers = {
        name: functools.partial(_read_module, path / name, description, **kinds)
        for name, description in config["modules"].items()
    }
    texts = {name: _read_text(path, name) for name in config["texts"]}
    check_digests(texts, config["texts"], path)
    return Bundle(
        Modules(readers),
        config["modules"] | config["described"],
        texts.get("text"),
        str(path),
        texts.get("negative_text"),
        config["source"],
        str(config.get("licence", "")),
    )


def verify_bundle(path: Path | str) -> None:
    """Compare every array of a bundle with its digest, a few in memory at a time.

    Raises one ValueError that names all arrays, items and texts that are damaged.
    """
    path = Path(path).absolute()
    config = _read_config(path)
    lines = []
    for name in config["modules"]:
        try:
            lines += find_damage(path / name)
        except ValueError as error:
            lines.append(first_line(error))
    for name, digest in config["texts"].items():
        try:
            check_digests({name: _read_text(path, name)}, {name: digest}, path)
        except ValueError as error:
            lines.append(f"{path / name}.npy: {first_line(error)}")
    if lines:
        raise ValueError(
            f"{path} is damaged in {len(lines)} places; take another copy:\n  "
            + "\n  ".join(lines)
        )


def identify_bundle(path: Path | str) -> str:
    """Give a digest of all parameters and texts of a bundle, by their own digests."""
    path = Path(path).absolute()
    config = _read_config(path)
    parts = [read_json(path / name / DIGESTS) for name in sorted(config["modules"])]
    text = json.dumps([config["texts"], *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def abstract_parameters(model: nnx.Module, shardings: Mapping[str, Sharding]) -> Arrays:
    """Give shape, type and sharding of every parameter."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in parameters(model).items()
    }


def within(module: str, patterns: Collection[str]) -> tuple[str, ...]:
    """Give the patterns that begin with a module's name, without it."""
    start = f"{module}."
    return tuple(p.removeprefix(start) for p in patterns if p.startswith(start))


def _read_module(folder, description, *, dtype, mesh, verify, int8):
    model = abstract_model(description, dtype)
    wanted = abstract_parameters(model, parameter_shardings(model, mesh))
    stacked = stacked_parameters(model)
    wanted = held_in_int8(wanted, stacked, within(folder.name, int8))
    values = read_arrays(folder, wanted, stacked, verify=verify)
    return with_statistics(with_parameters(model, values), mesh)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path}/{CONFIG} has format {config.get('format')}; this code reads "
            f"bundles of format {FORMAT}. Convert or train the model again."
        )
    digest = config.pop(DIGEST, None)
    if digest != digest_json(config) and not trusted():
        what = "differs from the one stored" if digest is not None else "is missing"
        raise ValueError(
            f"{path}/{CONFIG} is damaged: its checksum {what}. Take another copy, or "
            "read it as it is by --trust."
        )
    _check_config(config, path / CONFIG)
    return config


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for what is no config.json of a bundle, whoever wrote it."""
    parts = ("modules", "described", "texts", "source")
    for name in parts:
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{path}: {name} is {config.get(name)!r}, no JSON object.")
    if not all(type(digest) is int for digest in config["texts"].values()):
        raise ValueError(f"{path}: texts are {config['texts']}, no checksums.")
    if not set(config["texts"]) <= set(TEXTS):
        raise ValueError(f"{path}: texts are {sorted(config['texts'])}, not {TEXTS}.")
    for part in ("modules", "described"):
        for name, description in config[part].items():
            if not name.isidentifier():
                raise ValueError(f"{path}: {part} has {name!r}, no name of a folder.")
            check_description(description, f"{path}: {part}.{name}")


def _read_text(path: Path, name: str) -> np.ndarray:
    file = path / f"{name}.npy"
    if not file.exists():
        raise ValueError(f"{file} is missing; take another copy of the checkpoint.")
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(file, error) from error
