"""Folders that appear all at once, and JSON."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cityrag_jax.parallel import is_writer, on_writer


class renamed:
    """Context: write to a temporary sibling of `path`, renamed when all went well.

    Of several processes the writer makes and renames it; in the meantime all write.
    """

    def __init__(self, path: Path, overwrite: bool):
        self.path = path.absolute()
        self.overwrite = overwrite
        alone = jax.process_count() == 1
        suffix = f".tmp-{os.getpid() if alone else 'joined'}"
        self.temporary = self.path.with_name(f".{path.name}{suffix}")

    def __enter__(self) -> Path:
        on_writer(self._begin)
        return self.temporary

    def __exit__(self, kind, *_):
        if kind is None:
            on_writer(self._commit)
        elif is_writer():
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _begin(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise ValueError(f"{self.path} exists; delete it or choose another name.")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    def _commit(self) -> None:
        replaced = self.temporary.with_suffix(".replaced")
        if self.path.exists():
            os.rename(self.path, replaced)
        os.rename(self.temporary, self.path)
        shutil.rmtree(replaced, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError if the file is missing or holds something else."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; is {path.parent} a model folder?")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: it is not JSON ({error}); take another copy."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} is damaged: it holds no JSON object; take another copy."
        )
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
