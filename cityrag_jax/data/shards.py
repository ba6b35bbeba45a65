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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8

from cityrag_jax.data.records import VERSION, dataset_info, file_name, list_files
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

    `files` are those of `count` panoramas, `shard` each, in `folder`.
    """

    folder: Path
    files: tuple[str, ...]
    count: int
    shard: int
    encoded: Encoded

    def __call__(self, number: int) -> int:
        """Make a file, and the note that it is made; give its number."""
        first = number * self.shard
        stop = min(first + self.shard, self.count)
        part = zip(range(first, stop), self.encoded(first, stop), strict=True)
        path = self.folder / self.files[number]
        write_whole(self._note(number), json.dumps(_write_file(path, part)))
        return number

    @property
    def pickled(self) -> Path:
        """Where the job itself lies for processes of other machines, if it does."""
        return self.folder / "job.pickle"

    def missing(self) -> list[int]:
        """List the files that are still to be made."""
        numbers = range(len(self.files))
        return [n for n in numbers if not self._note(n).exists()]

    def notes(self) -> list[dict[str, Any]]:
        """Read what went into each file."""
        numbers = range(len(self.files))
        return [json.loads(self._note(n).read_text()) for n in numbers]

    def forget(self) -> None:
        """Remove all but the files."""
        self.pickled.unlink(missing_ok=True)
        for number in range(len(self.files)):
            self._note(number).unlink()

    def _note(self, number: int) -> Path:
        return self.folder / f"{self.files[number]}{NOTE}"


def in_processes(workers: int, job: Job, numbers: list[int]) -> Iterator[int]:
    """Spread files over processes of this machine."""
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    kinds = dict(mp_context=context, initializer=_take, initargs=(job,))
    with ProcessPoolExecutor(min(workers, max(1, len(numbers))), **kinds) as pool:
        yield from pool.map(_make, numbers)


_JOB: list[Job] = []  # of a worker: handed over once, it may know a million names


def _take(job: Job) -> None:
    _JOB[:] = [job]


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
    path = folder / "panoramas" / VERSION
    path.mkdir(parents=True, exist_ok=True)
    old = list_files(before) if before else []
    total = len(old) + -(-count // SHARD)
    _keep_of_plan(path, plan)
    for number, (file, _) in enumerate(old):
        link(file, path / file_name(number, total))
    names = tuple(file_name(number, total) for number in range(len(old), total))
    job = Job(path, names, count, SHARD, encoded)
    for _ in spread(job, job.missing()):
        pass
    notes = job.notes()
    lengths = [length for _, length in old] + [note["records"] for note in notes]
    old_bytes = dataset_info(before)["numBytes"] if before else 0
    _write_metadata(path, lengths, old_bytes + sum(note["bytes"] for note in notes))
    job.forget()
    (path / PLAN).unlink()
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
    """Remove what lies in a folder from another plan, and note down this one."""
    noted = path / PLAN
    try:
        if json.loads(noted.read_text())["plan"] == plan:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for stale in path.iterdir():
        stale.unlink()
    write_whole(noted, json.dumps({"plan": plan}))


def _write_file(
    path: Path, panoramas: Iterable[tuple[int, list[bytes] | None]]
) -> dict[str, Any]:
    """Fill one file under a temporary name; say what went into it."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    temporary = path.with_name(f".{path.name}")
    # JPEG does not shrink: one record a group, uncompressed, is read by itself.
    writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1,uncompressed")
    records, num_bytes, dropped = 0, 0, []
    for number, tiles in panoramas:
        if tiles is None:
            dropped.append(number)
        for tile in tiles or ():
            example = tf_example_pb2.Example()
            example.features.feature["jpeg"].bytes_list.value.append(tile)
            with named(path):
                writer.write(example.SerializeToString())
            records, num_bytes = records + 1, num_bytes + len(tile)
    with named(path):
        writer.close()
    os.replace(temporary, path)
    return {"records": records, "bytes": num_bytes, "dropped": dropped}


def copy_shards(source: Path, target: Path, dropped: set[int]) -> None:
    """Copy the tiles of a city without those of some panoramas.

    A file that holds none of them is linked, or copied where links cannot be.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    path = target / "panoramas" / VERSION
    path.mkdir(parents=True)
    parts, first, num_bytes = [], 0, dataset_info(source)["numBytes"]
    for shard, length in list_files(source):
        count = length // panorama.TILES
        gone = [k for k in range(count) if first + k in dropped]
        first += count
        parts.append((shard, sorted(set(range(count)) - set(gone))))
        if gone:
            reader = ArrayRecordReader(os.fspath(shard))
            num_bytes -= sum(len(tile) for k in gone for tile in _tiles(reader, k))
            reader.close()
    parts = [(shard, kept) for shard, kept in parts if kept]
    lengths = []
    for number, (shard, kept) in enumerate(parts):
        place = path / file_name(number, len(parts))
        reader = ArrayRecordReader(os.fspath(shard))
        if len(kept) * panorama.TILES == reader.num_records():
            link(shard, place)
        else:
            _write_file(place, ((k, _tiles(reader, k)) for k in kept))
        reader.close()
        lengths.append(len(kept) * panorama.TILES)
    _write_metadata(path, lengths, num_bytes)


def _tiles(reader: Any, place: int) -> list[bytes]:
    """Read the tiles of a file's panorama."""
    from tensorflow_datasets.proto import tf_example_pb2

    first = place * panorama.TILES
    found = reader.read(first, first + panorama.TILES)
    examples = [tf_example_pb2.Example.FromString(record) for record in found]
    return [x.features.feature["jpeg"].bytes_list.value[0] for x in examples]


def _write_metadata(path: Path, lengths: list[int], num_bytes: int) -> None:
    """Write what makes the folder a TensorFlow Datasets one."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name="panoramas", filetype_suffix="array_record"
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
        description="JPEG tiles: record panorama * 40 + tile.",
        disable_shuffling=True,
    )
