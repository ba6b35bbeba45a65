"""Files that appear whole or not at all, and errors that say which file it was."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Let an OSError name this file: one of writing knows none, as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name, then put it where one of its name may be."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with named(path):
            temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
