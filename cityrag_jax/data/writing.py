"""Writing a city: under a temporary name, resumed after a kill, renamed when whole.

`store.py` says what lies in the folder and reads it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

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
from cityrag_jax.data.remote import refuse_remote
from cityrag_jax.data.shards import Spread, encode_panorama, map_ahead, write_shards
from cityrag_jax.data.store import City
from cityrag_jax.geo.panorama import tile_edges

Picture = UInt8[np.ndarray, "P W 3"] | None
Panoramas = Iterable[Picture] | Callable[[int, int], Iterable[Picture]]


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a city is written.

    Tiles of a JPEG `quality` are encoded in `threads`, in each process that `spread`
    lets make files. `overwrite` replaces a city that stands there. The first captures
    are those of a city `before`, whose files are taken over. `finish` gets the folder
    before it is renamed.
    """

    quality: int = 90
    threads: int | None = None
    spread: Spread = map
    overwrite: bool = False
    before: City | None = None
    finish: Callable[[Path], object] | None = None


def write_city(
    folder: str | Path,
    header: CityHeader,
    captures: Captures,
    panoramas: Panoramas,
    provenance: Provenance | None = None,
    how: Writing | None = None,
) -> City:
    """Write a city under a temporary name and rename it when it is complete.

    `panoramas`, in the captures' order, holds None where one cannot be read: its
    capture goes, too. Without `provenance` captures are numbered. Killed, the same call
    goes on with the files that lack; `panoramas` may be a function that gives those
    from a number on up to another, so that none is made in vain. It gives those behind
    the captures of `how.before`. Raises ValueError, and leaves nothing behind, when
    anything does not fit.
    """
    folder, how = Path(folder), how or Writing()
    check_free(folder, how.overwrite)
    tile_edges(header.panorama_height)
    check_captures(captures, header, header.name)
    provenance = provenance or number_captures(captures)
    check_provenance(provenance, len(captures), header.name)
    temporary = folder.parent / f".{folder.name}.writing"
    temporary.mkdir(parents=True, exist_ok=True)
    with sole_writer(temporary):
        try:
            kept = _write_tiles(temporary, header, captures, panoramas, provenance, how)
            captures, provenance = captures.select(kept), provenance.select(kept)
            write_columns(temporary, header, captures, provenance)
            write_header(temporary, header, len(captures))
            City(temporary)
            if how.finish:
                how.finish(temporary)
        except ValueError:
            shutil.rmtree(temporary)
            raise
        take_place(temporary, folder)
    return City(folder)


def _write_tiles(
    temporary: Path,
    header: CityHeader,
    captures: Captures,
    panoramas: Panoramas,
    provenance: Provenance,
    how: Writing,
) -> Bool[np.ndarray, " N"]:
    """Write the panoramas' files; say which captures have one that could be read."""
    known = len(how.before) if how.before else 0
    count = len(captures) - known
    if not callable(panoramas):
        if how.spread is not map:
            raise ValueError("Panoramas that come one by one cannot be spread.")
        panoramas = _InOrder(panoramas, count)
    threads = how.threads or os.cpu_count() or 1
    dropped = write_shards(
        temporary,
        count,
        functools.partial(_encode, panoramas, header, how.quality, threads, count),
        plan_digest(header, captures, provenance, how.quality),
        spread=how.spread,
        before=how.before and how.before.folder,
    )
    kept = np.ones(len(captures), bool)
    kept[known + np.array(dropped, int)] = False
    if not kept[known:].any():
        raise ValueError(f"{header.name}: none of {count} pictures is readable.")
    return kept


class _InOrder:
    """Panoramas that come once, one behind the other, by their numbers.

    The last ones bring one too many along, where there is one.
    """

    def __init__(self, panoramas: Iterable[Picture], count: int):
        self._rest, self._at, self._count = iter(panoramas), 0, count

    def __call__(self, first: int, stop: int) -> Iterator[Picture]:
        begin, self._at = first - self._at, stop
        end = begin + stop - first + (stop == self._count)
        return itertools.islice(self._rest, begin, end)


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse to write where something stands, unless it may be replaced."""
    refuse_remote(folder)
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
    panoramas: Callable[[int, int], Iterable[Picture]],
    header: CityHeader,
    quality: int,
    num_threads: int,
    count: int,
    first: int,
    stop: int,
) -> Iterator[list[bytes] | None]:
    """Give the tiles of panoramas `first` to `stop` - 1, of `count` in all."""

    def encode(picture: np.ndarray | None) -> list[bytes] | None:
        return None if picture is None else encode_panorama(picture, quality)

    pictures = _check_panoramas(panoramas(first, stop), header, first, stop, count)
    return map_ahead(encode, pictures, num_threads)


def _check_panoramas(
    panoramas: Iterable[Picture], header: CityHeader, first: int, stop: int, poses: int
) -> Iterator[Picture]:
    count, shape = first, (header.panorama_height, 2 * header.panorama_height, 3)
    for count, picture in enumerate(panoramas, first + 1):
        if picture is not None and (
            picture.shape != shape or picture.dtype != np.uint8
        ):
            raise ValueError(
                f"{header.name}: panorama {count - 1} is {picture.dtype} of "
                f"{picture.shape}, the city's are uint8 of {shape}; resize it."
            )
        if count > stop:
            break
        yield picture
    if count != stop:
        more = "or more " if count > stop else ""
        raise ValueError(
            f"{header.name}: {count} {more}panoramas but {poses} poses; "
            "give one pose for each panorama, in the same order."
        )
