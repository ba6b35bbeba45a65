"""Writing a city: under a temporary name, resumed after a kill, renamed when whole.

`store.py` says what lies in the folder and reads it.
"""

import contextlib
import fcntl
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cityrag_jax.data.captures import (
    Captures,
    CityHeader,
    check_captures,
    write_header,
)
from cityrag_jax.data.columns import plan_digest, write_columns
from cityrag_jax.data.provenance import (
    Provenance,
    check_provenance,
    number_captures,
)
from cityrag_jax.data.records import encode_panorama, map_ahead, write_records
from cityrag_jax.data.store import City
from cityrag_jax.geo.panorama import tile_edges

Picture = UInt8[np.ndarray, "P W 3"] | None
Panoramas = Iterable[Picture] | Callable[[int], Iterable[Picture]]


def write_city(
    folder: str | Path,
    header: CityHeader,
    captures: Captures,
    panoramas: Panoramas,
    *,
    provenance: Provenance | None = None,
    quality: int = 90,
    num_threads: int | None = None,
    overwrite: bool = False,
    before: City | None = None,
    finish: Callable[[Path], object] | None = None,
) -> City:
    """Write a city under a temporary name and rename it when it is complete.

    `panoramas`, in the captures' order, holds None where one cannot be read: its
    capture goes, too. JPEG tiles are encoded in threads. Without `provenance` captures
    are numbered. Killed, the same call goes on behind the last whole file; `panoramas`
    may be a function that gives those from a number on, so that none is made in vain.
    The first captures are those of a city `before`, whose files are taken over;
    `panoramas` are of the others. `finish` gets the folder before it is renamed. Raises
    ValueError, and leaves nothing behind, when anything does not fit.
    """
    folder = Path(folder)
    check_free(folder, overwrite)
    tile_edges(header.panorama_height)
    check_captures(captures, header, header.name)
    provenance = provenance or number_captures(captures)
    check_provenance(provenance, len(captures), header.name)
    known = len(before) if before else 0
    count, threads = len(captures) - known, num_threads or os.cpu_count() or 1
    temporary = folder.parent / f".{folder.name}.writing"
    temporary.mkdir(parents=True, exist_ok=True)
    with sole_writer(temporary):
        try:
            plan = plan_digest(header, captures, provenance, quality)
            encoded = functools.partial(
                _encode, panoramas, header, count, quality, threads
            )
            dropped = write_records(
                temporary, count, encoded, plan, before and before.folder
            )
            kept = np.ones(len(captures), bool)
            kept[known + np.array(dropped, int)] = False
            if not kept[known:].any():
                raise ValueError(
                    f"{header.name}: none of {count} pictures is readable."
                )
            captures, provenance = captures.select(kept), provenance.select(kept)
            write_columns(temporary, header, captures, provenance)
            write_header(temporary, header, len(captures))
            City(temporary)
            if finish:
                finish(temporary)
        except ValueError:
            shutil.rmtree(temporary)
            raise
        take_place(temporary, folder)
    return City(folder)


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse to write where something stands, unless it may be replaced."""
    if folder.exists() and not overwrite:
        raise ValueError(
            f"{folder} exists already; remove it, choose another name, or give "
            "--overwrite."
        )


@contextlib.contextmanager
def sole_writer(temporary: Path) -> Iterator[None]:
    """Hold a lock on a folder, which the system gives back however we end."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(
            f"{temporary} is being written by another process; wait for it."
        ) from error
    finally:
        os.close(descriptor)


def take_place(temporary: Path, folder: Path) -> None:
    """Give a finished city its name; the one before goes when that is done."""
    replaced = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
    if folder.exists():
        os.replace(folder, replaced)
    try:
        os.replace(temporary, folder)
    except OSError:
        if replaced.exists():
            os.replace(replaced, folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _encode(
    panoramas: Panoramas,
    header: CityHeader,
    count: int,
    quality: int,
    num_threads: int,
    first: int,
) -> Iterator[list[bytes] | None]:
    """Give the tiles of panoramas from one on, of `count` in all."""

    def encode(picture: np.ndarray | None) -> list[bytes] | None:
        return None if picture is None else encode_panorama(picture, quality)

    pictures = (
        panoramas(first)
        if callable(panoramas)
        else itertools.islice(panoramas, first, None)
    )
    checked = _check_panoramas(pictures, header, first, count)
    return map_ahead(encode, checked, num_threads)


def _check_panoramas(
    panoramas: Iterable[np.ndarray | None],
    header: CityHeader,
    first: int,
    num_captures: int,
) -> Iterator[np.ndarray | None]:
    count, shape = first, (header.panorama_height, 2 * header.panorama_height, 3)
    for count, picture in enumerate(panoramas, first + 1):
        if picture is not None and (
            picture.shape != shape or picture.dtype != np.uint8
        ):
            raise ValueError(
                f"{header.name}: panorama {count - 1} is {picture.dtype} of "
                f"{picture.shape}, the city's are uint8 of {shape}; resize it."
            )
        if count > num_captures:
            break
        yield picture
    if count != num_captures:
        more = "or more " if count > num_captures else ""
        raise ValueError(
            f"{header.name}: {count} {more}panoramas but {num_captures} poses; "
            "give one pose for each panorama, in the same order."
        )
