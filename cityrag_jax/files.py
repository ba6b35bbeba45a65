"""Files and folders that appear whole or not at all, errors that name them, and who
of this machine's processes still lives to finish what it began."""

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What libraries that write by themselves tell in words, as RuntimeErrors.
TOLD = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Let an OSError name this file: one of writing knows none, as of a full disk."""
    try:
        yield
    except RuntimeError as error:
        for number in TOLD:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def open_folder(path: Path | str) -> Path:
    """Make a folder and try to write there, before anything is computed for it.

    Raises ValueError where that fails.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        in_the_way = [x for x in (path, *path.parents) if x.is_file()]
        reason = f"{in_the_way[0]} is a file" if in_the_way else error.strerror
        raise ValueError(
            f"{path} cannot be written to ({reason}); choose another folder."
        ) from error
    return path


@contextlib.contextmanager
def made_for_use(path: Path | str) -> Iterator[None]:
    """Take folders away again that were made on the way to a path and stay empty.

    So a command that is refused leaves nothing behind.
    """
    path = Path(path).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # something is there: the rest stays, too
            for folder in filter(Path.exists, new):
                folder.rmdir()


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


def is_running(pid: int | None) -> bool:
    """Say whether another process of this machine has that number."""
    if pid is None or pid == os.getpid():  # a container gives the same to its next one
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def machine() -> str:
    """Name what process numbers count in: a boot, and a container of it."""
    told = [socket.gethostname()]
    with contextlib.suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        told.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(told)
