"""Writing the tiles of panoramas: files of a fixed number of panoramas.

How many files there will be is known before the first one is written, so each is a
piece of work of its own: whoever makes it, in whatever order, writes the same bytes
under a temporary name, renames it, and leaves a note beside it of what went in. What
has a note is not made again. `Spread` says who makes them: `map` in this process, one
after the other, `in_processes` some at a time, `data/beam.py` many machines.
"""

import collections
import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8

from cityrag_jax.data.records import (
    APART,
    VERSION,
    Parts,
    dataset_info,
    file_name,
    find_parts,
    list_files,
)
from cityrag_jax.files import named, write_whole
from cityrag_jax.geo import panorama

SHARD = 256  # panoramas a file: 0.8 GB of those 2048 high
IN_FLIGHT = 32  # panoramas; one of 4096x2048 pixels takes 25 MB
PLAN, NOTE = "plan.json", ".json"

# Gives the tiles of panoramas from one on, up to another; None for what is unreadable.
Encoded = Callable[[int, int], Iterable[list[bytes] | None]]
# Lets a job make files by their numbers, in any order, and says which one is made.
Spread = Callable[[Callable[[int], int], list[int]], Iterable[int]]


def encode_panorama(
    picture: UInt8[np.ndarray, "P W 3"], quality: int = 90
) -> list[bytes]:
    """Cut a panorama into its JPEG tiles, row by row."""
    rows, columns = panorama.tile_edges(picture.shape[0])
    return [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(
                picture[rows[r] : rows[r + 1], columns[c] : columns[c + 1]]
            ),
            quality=quality,
            colorsubsampling="420",
        )
        for r in range(panorama.TILE_ROWS)
        for c in range(panorama.TILE_COLUMNS)
    ]


def map_ahead(
    function: Callable[[Any], Any], items: Iterable[Any], num_threads: int
) -> Iterator[Any]:
    """Compute ahead in threads, in order, with a bounded number in flight."""
    waiting, most = collections.deque(), min(2 * num_threads, IN_FLIGHT)
    with ThreadPoolExecutor(num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a process anywhere needs to make one of the files.

    They are those of `count` panoramas, `shard` each, in a city's `folder`: a file in
    each of the datasets `parts`, numbered from `known` on, `total` in all.
    """

    folder: Path
    parts: Parts
    known: int
    total: int
    count: int
    shard: int
    encoded: Encoded

    def __call__(self, number: int) -> int:
        """Make a file of each dataset, and a note that they are made."""
        first = number * self.shard
        stop = min(first + self.shard, self.count)
        panoramas = zip(range(first, stop), self.encoded(first, stop), strict=True)
        note = _write_files(self.paths(self.known + number), self.parts, panoramas)
        write_whole(self._note(number), json.dumps(note))
        return number

    def paths(self, number: int) -> dict[str, Path]:
        """Give where a file of each dataset lies."""
        return {
            name: self.folder / name / VERSION / file_name(name, number, self.total)
            for name in self.parts
        }

    def missing(self) -> list[int]:
        """List the files that are still to be made."""
        return [n for n in self._numbers() if not self._note(n).exists()]

    def notes(self) -> list[dict[str, Any]]:
        """Read what went into each file."""
        return [json.loads(self._note(n).read_text()) for n in self._numbers()]

    def forget(self) -> None:
        """Remove all but the files."""
        self.pickled.unlink(missing_ok=True)
        for number in self._numbers():
            self._note(number).unlink()

    @property
    def pickled(self) -> Path:
        """Where the job itself lies for processes of other machines, if it does."""
        return self.folder / "panoramas" / VERSION / "job.pickle"

    def _numbers(self) -> range:
        return range(self.total - self.known)

    def _note(self, number: int) -> Path:
        path = self.paths(self.known + number)["panoramas"]
        return path.with_name(f"{path.name}{NOTE}")


def in_processes(workers: int, job: Job, numbers: list[int]) -> Iterator[int]:
    """Spread files over processes of this machine, which end when this one does."""
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    kinds = dict(mp_context=context, initializer=_take, initargs=(job, os.getpid()))
    pool = ProcessPoolExecutor(min(workers, max(1, len(numbers))), **kinds)
    try:
        yield from pool.map(_make, numbers)
    except BrokenProcessPool as error:
        raise OSError(
            f"One of {workers} processes was killed: too little memory? What is made "
            "stays; give the same command with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_JOB: list[Job] = []  # of a worker: handed over once, it may know a million names


def _take(job: Job, parent: int) -> None:
    _JOB[:] = [job]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _make(number: int) -> int:
    return _JOB[0](number)


def write_shards(
    folder: Path,
    count: int,
    encoded: Encoded,
    plan: int,
    *,
    spread: Spread = map,
    before: Path | None = None,
) -> list[int]:
    """Store the tiles of `count` panoramas in files of `SHARD`, with metadata.

    Gives the numbers of those that cannot be read. Files that stand in the folder from
    an interrupted writing of the same `plan` are kept. The files of a city `before`
    come first, as links.
    """
    parts = find_parts(before) if before else APART
    for name in parts:
        (folder / name / VERSION).mkdir(parents=True, exist_ok=True)
        _keep_of_plan(folder / name / VERSION, plan)
    old = {name: list_files(before / name) if before else [] for name in parts}
    known = len(old["panoramas"])
    total = known + -(-count // SHARD)
    job = Job(folder, parts, known, total, count, SHARD, encoded)
    for name, files in old.items():
        for number, (file, _) in enumerate(files):
            link(file, job.paths(number)[name])
    for _ in spread(job, job.missing()):
        pass
    notes = job.notes()
    for name in parts:
        info = dataset_info(before / name) if before else {}
        lengths = [length for _, length in old[name]]
        lengths += [note[name]["records"] for note in notes]
        num_bytes = sum(note[name]["bytes"] for note in notes)
        _write_metadata(folder / name, lengths, info.get("numBytes", 0) + num_bytes)
        (folder / name / VERSION / PLAN).unlink()
    job.forget()
    return [k for note in notes for k in note["dropped"]]


def link(file: Path, target: Path) -> None:
    """Let a file have another name, too; copy it where a disk cannot do that."""
    if target.exists():
        return
    try:
        os.link(file, target)
    except OSError:
        temporary = target.with_name(f".{target.name}")
        shutil.copy2(file, temporary)
        os.replace(temporary, target)


def _keep_of_plan(path: Path, plan: int) -> None:
    """Remove what lies in a folder from another plan, and note down this one.

    Of the same plan the files that were begun go.
    """
    noted = path / PLAN
    try:
        if json.loads(noted.read_text())["plan"] == plan:
            for begun in path.glob(".*"):
                begun.unlink()
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for stale in path.iterdir():
        stale.unlink()
    write_whole(noted, json.dumps({"plan": plan}))


def _write_files(
    paths: dict[str, Path],
    parts: Parts,
    panoramas: Iterable[tuple[int, list[bytes] | None]],
) -> dict[str, Any]:
    """Fill a file of each dataset under a temporary name; say what went into them."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    own = f"-{os.getpid()}"  # of one that was killed somebody may still write the like
    temporary = {n: p.with_name(f".{p.name}{own}") for n, p in paths.items()}
    # JPEG does not shrink: one record a group, uncompressed, is read by itself.
    options = "group_size:1,uncompressed"
    writers = {
        n: ArrayRecordWriter(os.fspath(p), options) for n, p in temporary.items()
    }
    note: dict[str, Any] = {name: {"records": 0, "bytes": 0} for name in parts}
    note["dropped"] = []
    for number, tiles in panoramas:
        if tiles is None:
            note["dropped"].append(number)
            continue
        for name, places in parts.items():
            for tile in places:
                example = tf_example_pb2.Example()
                example.features.feature["jpeg"].bytes_list.value.append(tiles[tile])
                with named(paths[name]):
                    writers[name].write(example.SerializeToString())
                note[name]["records"] += 1
                note[name]["bytes"] += len(tiles[tile])
    for name, path in paths.items():
        with named(path):
            writers[name].close()
        os.replace(temporary[name], path)
    return note


def copy_shards(source: Path, target: Path, dropped: set[int]) -> None:
    """Copy the tiles of a city without those of some panoramas.

    A file that holds none of them is linked, or copied where links cannot be.
    """
    for name, tiles in find_parts(source).items():
        (target / name / VERSION).mkdir(parents=True)
        _copy_dataset(source / name, target / name, len(tiles), dropped)


def _copy_dataset(source: Path, target: Path, tiles: int, dropped: set[int]) -> None:
    """Copy a dataset of so many tiles a panorama."""
    from array_record.python.array_record_module import ArrayRecordReader

    name, first = source.name, 0
    files, num_bytes = [], dataset_info(source)["numBytes"]
    for file, length in list_files(source):
        rows = range(length // tiles)
        gone = [k for k in rows if first + k in dropped]
        first += len(rows)
        files.append((file, sorted(set(rows) - set(gone))))
        if gone:
            reader = ArrayRecordReader(os.fspath(file))
            num_bytes -= sum(sum(map(len, _read(reader, k, tiles))) for k in gone)
            reader.close()
    files = [(file, kept) for file, kept in files if kept]
    for number, (file, kept) in enumerate(files):
        place = target / VERSION / file_name(name, number, len(files))
        reader = ArrayRecordReader(os.fspath(file))
        if len(kept) * tiles == reader.num_records():
            link(file, place)
        else:
            part = {name: tuple(range(tiles))}
            _write_files(
                {name: place}, part, ((k, _read(reader, k, tiles)) for k in kept)
            )
        reader.close()
    _write_metadata(target, [len(kept) * tiles for _, kept in files], num_bytes)


def _read(reader: Any, panorama: int, tiles: int) -> list[bytes]:
    """Read the tiles of a file's panorama."""
    from tensorflow_datasets.proto import tf_example_pb2

    found = reader.read(panorama * tiles, (panorama + 1) * tiles)
    examples = [tf_example_pb2.Example.FromString(record) for record in found]
    return [x.features.feature["jpeg"].bytes_list.value[0] for x in examples]


def _write_metadata(dataset: Path, lengths: list[int], num_bytes: int) -> None:
    """Write what makes the folder a TensorFlow Datasets one."""
    import tensorflow_datasets as tfds

    path = dataset / VERSION
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name=dataset.name, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=lengths,
        num_bytes=num_bytes,
        filename_template=template.replace(split="train"),
    )
    jpeg = tfds.features.Tensor(shape=(), dtype=np.bytes_)
    tfds.folder_dataset.write_metadata(
        data_dir=path,
        features=tfds.features.FeaturesDict({"jpeg": jpeg}),
        split_infos=[split],
        filename_template=template,
        check_data=False,
        description="JPEG tiles of panoramas, row by row.",
        disable_shuffling=True,
    )
