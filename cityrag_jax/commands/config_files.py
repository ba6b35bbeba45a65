"""Config files by name, and changes to their values from a command line."""

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cityrag_jax.commands.config_keys import MEANINGS

PACKAGE = Path(__file__).parents[1]
# Where `configs/...` is looked for when it is not in the working folder: inside an
# installed package, or beside the package in a checkout.
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False}
BOOLEANS["no"] = False


def find_shipped(path: Path | str) -> Path:
    """Give a path, or what is shipped under it if there is nothing: `configs/...`."""
    path = Path(path)
    for folder in SHIPPED if path.parts[:1] == ("configs",) else ():
        if not path.exists() and folder.joinpath(*path.parts[1:]).exists():
            return folder.joinpath(*path.parts[1:])
    return path


def load_config(spec: str) -> ConfigDict:
    """Load `FILE.py[:variant]`; ValueError for what cannot be loaded."""
    name, _, variant = spec.partition(":")
    path = find_shipped(name)
    if not path.is_file():
        shipped = sorted({f"configs/{f.name}" for s in SHIPPED for f in s.glob("*.py")})
        near = nearest(name, shipped) or shipped
        raise ValueError(f"There is no config {path}{_or(near)}.")
    try:
        module_spec = importlib.util.spec_from_file_location("config", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        get_config = module.get_config
    except Exception as error:  # whatever a person's own file may raise
        raise ValueError(
            f"{path} cannot be read as a config: {type(error).__name__}: {error}. It "
            "must be Python with a function get_config(variant)."
        ) from error
    config = get_config(variant or None)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config of {path} gave {config!r}, no ConfigDict.")
    return config.lock()


def change_config(config: ConfigDict, changes: Iterable[tuple[str, str]]) -> None:
    """Set values by dotted key from texts; ValueError names the nearest keys.

    A text is read as the type that stands there.
    """
    values = flatten(config)
    for key, text in changes:
        section, _, name = key.rpartition(".")
        if key not in values:
            inside = [k for k in values if k.startswith(f"{key}.")]
            near = inside or nearest_keys(key, values)
            kind = "is a section" if inside else "is no key of this config"
            raise ValueError(f"--config.{key} {kind}{_or(near)}.")
        target = config
        for part in section.split(".") if section else ():
            target = target[part]
        target[name] = read_value(key, text, values[key])


def read_value(key: str, text: str, now: Any) -> Any:
    """Read a text as a value like `now`."""
    try:
        if isinstance(now, bool):
            return BOOLEANS[text.lower()]
        if isinstance(now, str):
            return text
        value = ast.literal_eval(text)
        if isinstance(now, tuple):
            value = tuple(value) if isinstance(value, tuple | list) else (value,)
            return _like(value, now)
        if isinstance(now, float) and type(value) in (int, float):
            return float(value)
        if now is not None and type(value) is not type(now):
            raise TypeError(value)
        return value
    except (ValueError, TypeError, SyntaxError, KeyError, MemoryError) as error:
        kind = "true or false" if isinstance(now, bool) else type(now).__name__
        raise ValueError(
            f"--config.{key}={text!r} is no {kind}; it is {now!r} in the file."
        ) from error


def _like(value: tuple, now: tuple) -> tuple:
    """Give a tuple the types of another's elements, if those are all of one type."""
    kinds = {type(x) for x in now}
    if kinds == {float} and all(type(x) in (int, float) for x in value):
        return tuple(map(float, value))
    if len(kinds) == 1 and any(type(x) not in kinds for x in value):
        raise TypeError(value)
    return value


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Give all values by dotted key, in the file's order."""
    flat = {}
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """Give the words that look most like one, best first."""
    return difflib.get_close_matches(word, list(words), count, 0.6)


def nearest_keys(key: str, keys: Iterable[str]) -> list[str]:
    """Give keys that look like one: first those whose last part does."""
    keys = list(keys)
    last = key.rpartition(".")[2]
    same = [k for k in keys if last and last in k.rpartition(".")[2].split("_")]
    same = sorted(same, key=lambda k: k.partition(".")[0] != key.partition(".")[0])
    same = [k for k in keys if k.rpartition(".")[2] == last] + same
    return list(dict.fromkeys(same + nearest(key, keys)))[:3]


def describe_keys(config: ConfigDict) -> str:
    """List the keys of a config with their values and meanings."""
    values = {f"--config.{k}={_shown(v)}": k for k, v in flatten(config).items()}
    wide = 46
    lines = []
    for shown, key in values.items():
        meaning = MEANINGS.get(key, "")
        if len(shown) > wide:
            lines += [f"  {shown}"] + [f"  {'':<{wide}}  {meaning}"] * bool(meaning)
        else:
            lines.append(f"  {shown:<{wide}}  {meaning}".rstrip())
    return "\n".join(lines)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return f'"{text}"' if any(c in text for c in " ()'*") else text


def _or(near: list[str]) -> str:
    return f"; is {' or '.join(near)} meant?" if near else ""


def unused_meanings(configs: Iterable[ConfigDict]) -> Mapping[str, set[str]]:
    """Give keys without a meaning, and meanings without a key."""
    keys = {key for config in configs for key in flatten(config)}
    return {"missing": keys - MEANINGS.keys(), "unused": MEANINGS.keys() - keys}
