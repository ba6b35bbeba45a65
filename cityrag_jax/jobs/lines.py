"""Lists of jobs: one JSON object a line, each a video.

    {"id": "rue-1", "image": "photos/1.jpg", "path": "paths/1.geojson", "seed": 3,
     "speed_m_s": 4, "sample": {"num_steps": 20}}

Keys are those of the command line (`request.Order`), whose own values stand where a
line has none; `sample` changes keys of the config's section of that name. Files are
found from the list's folder. A line that is no job is kept with its fault, so that it
is told and the others go on.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cityrag_jax.commands.config_files import change_config, nearest
from cityrag_jax.request import Order

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# What a line may change of config.sample: nothing that another model or mesh needs.
SAMPLE = (
    *("num_steps", "shift", "guidance", "scales", "guided", "preset", "ratios"),
    *("spacing_m", "radius_m", "fps"),
)
FILES = ("image", "path", "text")
FIELDS = {field.name: field.type for field in dataclasses.fields(Order)}


@dataclasses.dataclass(frozen=True)
class JobLine:
    """A line of a list: a job by its id, or why it is none.

    `order` names files as they stand in the line, `folder` is where they are found.
    """

    number: int
    name: str
    order: Order
    folder: Path
    sample: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fault: str = ""

    def found(self) -> Order:
        """Give the order with its files as they are found."""
        given = {name: getattr(self.order, name) for name in FILES}
        paths = {k: str(self.folder / file) for k, file in given.items() if file}
        return dataclasses.replace(self.order, **paths)

    def facts(self) -> dict[str, Any]:
        """Say what the line asks for, as JSON holds it, and how large its files are.

        Two lines of equal facts ask for the same video.
        """
        order, found = dataclasses.asdict(self.order), dataclasses.asdict(self.found())
        sizes = {name: _size(found[name]) for name in FILES if found[name]}
        facts = {"id": self.name, **order, "sample": self.sample, "bytes": sizes}
        return json.loads(json.dumps(facts | {"fault": self.fault}))

    def noise_seed(self) -> int:
        """Mix seed and id into 64 bits: no two jobs share noise."""
        words = f"{self.name}\n{self.order.seed}".encode()
        return int.from_bytes(hashlib.sha256(words).digest()[:8], "big")

    def configure(self, config: ConfigDict) -> ConfigDict:
        """Give the config with the line's own values."""
        changed = config.copy_and_resolve_references()
        texts = {
            k: v if isinstance(v, str) else repr(v) for k, v in self.sample.items()
        }
        change_config(changed, [(f"sample.{k}", v) for k, v in texts.items()])
        return changed


def read_lines(path: Path | str, defaults: Order) -> list[JobLine]:
    """Read a list of jobs; ValueError if there is none, or nothing in it.

    Empty lines and such that begin with # are left out.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); give --jobs a file of UTF-8, one JSON "
            "object a line."
        ) from error
    lines, first = [], {}
    for number, words in enumerate(text.splitlines(), 1):
        if not words.strip() or words.lstrip().startswith("#"):
            continue
        try:
            line = _read_line(words, number, path.parent, defaults)
            if line.name in first:
                raise ValueError(
                    f"id {line.name!r} is that of line {first[line.name]} already; "
                    "give each job its own."
                )
            first[line.name] = number
        except (ValueError, RecursionError) as error:
            name = f"line-{number:06}"
            line = JobLine(number, name, defaults, path.parent, fault=str(error))
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} holds no job; write one JSON object a line.")
    return lines


def _read_line(words: str, number: int, folder: Path, defaults: Order) -> JobLine:
    try:
        given = json.loads(words)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}).") from error
    if not isinstance(given, dict):
        raise ValueError(f"{words[:40]} is no JSON object.")
    name, sample = given.pop("id", None), given.pop("sample", {})
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise ValueError(
            f"id is {name!r}; give up to 100 of letters, digits, '.', '_' and '-', "
            'such as "rue-1".'
        )
    for key, value in given.items():
        _check_field(key, value)
    _check_sample(sample)
    if given.get("path") or given.get("script"):  # each is instead of the other
        given = {"path": "", "script": "", **given}
    if given.get("speed_m_s") is not None:
        given["speed_m_s"] = float(given["speed_m_s"])
    order = dataclasses.replace(defaults, **given)
    order.check()
    return JobLine(number, name, order, folder, sample)


def _check_field(key: str, value: Any) -> None:
    if key not in FIELDS:
        near = nearest(key, [*FIELDS, "id", "sample"])
        hint = f"is {' or '.join(near)} meant" if near else f"use {', '.join(FIELDS)}"
        raise ValueError(f"{key!r} is no key of a job; {hint}?")
    kinds = {"seed": int, "speed_m_s": int | float | None, "burn_attribution": bool}
    kind = kinds.get(key, str)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        named = getattr(kind, "__name__", "number")
        raise ValueError(f"{key} is {value!r}; it must be a {named}.")


def _check_sample(sample: Any) -> None:
    unknown = sorted(set(sample) - set(SAMPLE)) if isinstance(sample, dict) else sample
    if unknown or not isinstance(sample, dict):
        raise ValueError(
            f"sample is {sample!r}; a job may change {', '.join(SAMPLE)} of the config."
        )


def _size(path: str) -> int | None:
    file = Path(path)
    return file.stat().st_size if file.is_file() else None
