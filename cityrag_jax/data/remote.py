"""Folders in object stores: gs://, s3://, az:// and hf://, as epath reads them.

A folder that is opened there gets a copy on this machine, below CITYRAG_CACHE, else
~/.cache/cityrag_jax: its tables are fetched at once, any other file whole when it is
first read. What was fetched stays until somebody removes it. The copy is named after
the content of the tables: a folder that was written anew is another. Nothing is written
to the store.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from cityrag_jax.files import write_whole

URL = re.compile(r"(gs|s3|az|hf):/+(?=[^/])")  # Path makes one slash of two
ORIGIN = "origin.json"  # in a copy: its url, and the names in its folders


def is_remote(folder: str | Path) -> bool:
    """Say whether this names a folder in an object store."""
    return bool(URL.match(str(folder)))


def bring(folder: str | Path, tables: Sequence[str], folders: Sequence[str]) -> Path:
    """Give a folder of this machine; of one in a store its copy, with these tables.

    Tables may be missing. Of `folders` the names of the files are noted. Raises
    ValueError where the store cannot be read.
    """
    if not is_remote(folder):
        return Path(folder)
    url = URL.sub(r"\1://", str(folder).rstrip("/"))
    try:
        root = _open(url)
        found = {t: (root / t).read_bytes() for t in tables if (root / t).exists()}
        there = [f for f in folders if (root / f).exists()]
        names = {f: sorted(path.name for path in (root / f).iterdir()) for f in there}
    except (OSError, ImportError, KeyError) as error:
        raise ValueError(f"{url} cannot be read: {error!r}.") from error
    if not found:
        raise ValueError(f"{url} holds none of {', '.join(tables)}.")
    origin = json.dumps({"url": url, "folders": names}, indent=1)
    digest = hashlib.sha256(origin.encode())
    for name, content in found.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    place = URL.sub(r"\1/", url) + f"-{digest.hexdigest()[:16]}"
    copy = _cache() / place
    for name, content in found.items():
        if not (copy / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(copy / name, content)
    if not (copy / ORIGIN).exists():
        write_whole(copy / ORIGIN, origin)
    return copy


def origin_of(folder: Path) -> str | None:
    """Give the url of which a folder is a copy; None if it is none."""
    return _read_origin(folder)["url"] if (folder / ORIGIN).exists() else None


def refuse_remote(folder: Path) -> None:
    """Raise ValueError for a folder of an object store, which is not written to."""
    url = str(folder) if is_remote(folder) else origin_of(folder)
    if url:
        raise ValueError(
            f"{url} lies in an object store, which is only read: write to a disk and "
            "copy the folder there."
        )


def list_names(folder: Path) -> set[str]:
    """List the files of a folder, those that are still to be fetched among them."""
    names = {path.name for path in folder.iterdir()}
    root = _root(folder)
    if root is None:
        return names
    noted = _read_origin(root)["folders"]
    return names | set(noted.get(folder.relative_to(root).as_posix(), ()))


def fetch(path: Path) -> Path:
    """Give a file, which is fetched first if it is one of a copy and not there yet.

    A file that the store has not is not there afterwards, either.
    """
    root = None if path.exists() else _root(path.parent)
    if root is None:
        return path
    source = _open(f"{origin_of(root)}/{path.relative_to(root).as_posix()}")
    if source.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unique = f"{os.getpid()}-{threading.get_ident()}"
        temporary = path.with_name(f".{path.name}-{unique}")
        try:
            with source.open("rb") as theirs, temporary.open("wb") as ours:
                shutil.copyfileobj(theirs, ours, 2**24)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _read_origin(copy: Path) -> dict:
    try:
        origin = json.loads((copy / ORIGIN).read_text())
        return {"url": str(origin["url"]), "folders": dict(origin["folders"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{copy / ORIGIN} is damaged ({error!r}); remove the folder: it is fetched "
            "anew."
        ) from error


def _open(url: str):
    from etils import epath

    return epath.Path(url)


def _cache() -> Path:
    told = os.environ.get("CITYRAG_CACHE")
    return Path(told) if told else Path.home() / ".cache" / "cityrag_jax"


def _root(folder: Path) -> Path | None:
    """Give the copy that a folder lies in."""
    for parent in (folder, *folder.parents[:3]):
        if (parent / ORIGIN).exists():
            return parent
    return None
