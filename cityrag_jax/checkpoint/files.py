"""Folders that appear all at once, and JSON."""

import glob
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cityrag_jax.files import is_running, machine, write_whole
from cityrag_jax.parallel import is_writer, on_writer


class renamed:
    """Context: write to a temporary sibling of `path`, renamed when all went well.

    Of several processes the writer makes and renames it; in the meantime all write.
    """

    def __init__(self, path: Path, overwrite: bool):
        self.path = path.absolute()
        self.overwrite = overwrite
        alone = jax.process_count() == 1
        self.temporary = self._named(
            f"{self._here()}{os.getpid()}" if alone else "joined"
        )

    def __enter__(self) -> Path:
        on_writer(self._begin)
        return self.temporary

    def __exit__(self, kind, *_):
        if kind is None:
            on_writer(self._commit)
        elif is_writer():
            self._remove()

    def _named(self, owner: str) -> Path:
        return self.path.with_name(f".{self.path.name}.tmp-{owner}")

    @staticmethod
    def _here() -> str:
        return f"{zlib.crc32(machine().encode()):08x}-"

    def _remove(self) -> None:
        """Remove what was written, and what threads of the failed write add to it."""
        for _ in range(20):
            shutil.rmtree(self.temporary, ignore_errors=True)
            time.sleep(0.1)
            if not self.temporary.exists():
                break

    def _remove_stale(self) -> None:
        """Remove what processes of this machine left that were killed."""
        begins = self._named(self._here()).name
        for other in self.path.parent.glob(f"{glob.escape(begins)}*"):
            pid = other.name.removeprefix(begins)
            if pid.isdigit() and not is_running(int(pid)):
                shutil.rmtree(other, ignore_errors=True)

    def _begin(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise ValueError(f"{self.path} exists; delete it or choose another name.")
        self._remove_stale()
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
    """Write a JSON object with sorted keys; it appears whole."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
