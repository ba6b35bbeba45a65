"""Folders that appear all at once, and JSON."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class renamed:
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError if the file is missing or holds something else."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; is {path.parent} a model folder?")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); take another copy.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; take another copy.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
