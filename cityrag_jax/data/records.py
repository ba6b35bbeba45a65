"""JPEG tiles of panoramas as a TensorFlow Datasets folder, without TensorFlow.

Record panorama * 40 + tile of `panoramas/1.0.0` is the bytes of one tile, in a
tf.train.Example, in uncompressed ArrayRecord files with one record a group. The tile
grid is that of geo/panorama.py.
"""

import bisect
import collections
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from google.protobuf.message import DecodeError
from jaxtyping import UInt8

from cityrag_jax.data.captures import REBUILD
from cityrag_jax.files import write_whole
from cityrag_jax.geo import panorama

VERSION = "1.0.0"
SHARD = 256  # panoramas a file: 0.8 GB of those 2048 high
OPENED = 64  # files at once; a process may have 1024
IN_FLIGHT = 32  # panoramas; one of 4096x2048 pixels takes 25 MB
PROGRESS = "progress.json"


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


def write_records(
    folder: Path,
    count: int,
    encoded: Callable[[int], Iterator[list[bytes] | None]],
    plan: int,
    before: Path | None = None,
) -> list[int]:
    """Store the tiles of panoramas in files of `SHARD` panoramas, with metadata.

    `encoded(k)` gives the tiles of panorama k and those behind it, None for one that
    cannot be read; the numbers of those are returned. Files that stand in the folder
    from an interrupted writing of the same `plan` are kept. The files of a city
    `before` come first, as links.
    """
    path = folder / "panoramas" / VERSION
    path.mkdir(parents=True, exist_ok=True)
    old = _shards(before) if before else []
    old_bytes = _dataset_info(before)["numBytes"] if before else 0
    added = -(-count // SHARD)
    shards = len(old) + added
    done = _read_progress(path / PROGRESS, plan)
    for number, (file, _) in enumerate(old):
        _link(file, path / _file_name(number, shards))
    panoramas = encoded(SHARD * len(done))
    for number in range(len(done), added):
        first, stop = SHARD * number, min(SHARD * (number + 1), count)
        part = zip(range(first, stop), panoramas, strict=False)
        file = path / _file_name(len(old) + number, shards)
        done.append(_write_shard(file, part))
        document = {"plan": plan, "shards": done}
        write_whole(path / PROGRESS, json.dumps(document))
    for _ in panoramas:  # whoever gives too many is to say so
        pass
    lengths = [length for _, length in old] + [shard["records"] for shard in done]
    num_bytes = old_bytes + sum(shard["bytes"] for shard in done)
    _write_metadata(path, lengths, num_bytes)
    (path / PROGRESS).unlink(missing_ok=True)
    return [k for shard in done for k in shard["dropped"]]


def _link(file: Path, target: Path) -> None:
    """Let a file have another name, too; copy it where a disk cannot do that."""
    if target.exists():
        return
    try:
        os.link(file, target)
    except OSError:
        temporary = target.with_name(f".{target.name}")
        shutil.copy2(file, temporary)
        os.replace(temporary, target)


def _read_progress(path: Path, plan: int) -> list[dict]:
    """Give what is known of the finished files, none if they are of another plan."""
    try:
        document = json.loads(path.read_text())
        if document["plan"] == plan:
            return document["shards"]
    except (OSError, ValueError, KeyError):
        pass
    for stale in path.parent.iterdir():
        stale.unlink()
    return []


def _write_shard(path: Path, panoramas: Iterable[tuple[int, list[bytes] | None]]):
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
            writer.write(example.SerializeToString())
            records, num_bytes = records + 1, num_bytes + len(tile)
    writer.close()
    os.replace(temporary, path)
    return {"records": records, "bytes": num_bytes, "dropped": dropped}


def copy_records(source: Path, target: Path, dropped: set[int]) -> None:
    """Copy the tiles of a city without those of some panoramas.

    A file that holds none of them is linked, or copied where links cannot be.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    path = target / "panoramas" / VERSION
    path.mkdir(parents=True)
    parts, first, num_bytes = [], 0, _dataset_info(source)["numBytes"]
    for shard, length in _shards(source):
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
        place = path / _file_name(number, len(parts))
        reader = ArrayRecordReader(os.fspath(shard))
        if len(kept) * panorama.TILES == reader.num_records():
            _link(shard, place)
        else:
            _write_shard(place, ((k, _tiles(reader, k)) for k in kept))
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


def _file_name(number: int, count: int) -> str:
    return f"panoramas-train.array_record-{number:05d}-of-{count:05d}"


class Records:
    """The stored JPEG tiles of a city, by record number. Safe to use from threads.

    Files are found by the dataset's own metadata. Raises ValueError, naming the file,
    where metadata or files are missing.
    """

    # One thread at a time may import the library: its lazy imports, made by several
    # threads at once, wait for each other for ever.
    _importing = threading.Lock()

    def __init__(self, folder: Path):
        with self._importing:
            from array_record.python.array_record_module import ArrayRecordReader
            from tensorflow_datasets.proto import tf_example_pb2

        self._shards = _shards(folder)
        self._stops = list(itertools.accumulate(length for _, length in self._shards))
        self._reader = ArrayRecordReader
        self._readers = collections.OrderedDict()
        self._opening = threading.Lock()
        self._example = tf_example_pb2.Example

    def __getitem__(self, number: int) -> bytes:
        shard = bisect.bisect_right(self._stops, number)
        place = number - (self._stops[shard - 1] if shard else 0)
        # A range of one takes 7 us; a list of one, which data sources ask for, takes
        # time in proportion to the file's records: 350 us for 100,000.
        try:
            (record,) = self._open(shard).read(place, place + 1)
            example = self._example.FromString(record)
        except (IndexError, RuntimeError, DecodeError) as error:
            raise ValueError(f"record {number} is damaged ({error})") from error
        return example.features.feature["jpeg"].bytes_list.value[0]

    def _open(self, shard: int):
        """Give a file's reader; the one that was not asked for longest is closed."""
        with self._opening:
            reader = self._readers.pop(shard, None)
            if reader is None:
                path, length = self._shards[shard]
                reader = self._reader(
                    os.fspath(path),
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
                # A file that cannot be opened says nothing but that it is empty.
                if reader.num_records() != length:
                    raise ValueError(
                        f"{path} holds {reader.num_records()} records instead of "
                        f"{length}, or could not be opened"
                    )
            self._readers[shard] = reader
            if len(self._readers) > OPENED:
                self._readers.popitem(last=False)
            return reader


def count_records(folder: Path) -> int:
    """Count the records that the files of a city should hold; see that they exist."""
    return sum(length for _, length in _shards(folder))


def _dataset_info(folder: Path) -> dict[str, Any]:
    """Read what the dataset says of its files."""
    path = folder / "panoramas" / VERSION / "dataset_info.json"
    try:
        split = json.loads(path.read_text())["splits"][0]
        lengths = [int(n) for n in split["shardLengths"]]
        return {"shardLengths": lengths, "numBytes": int(split["numBytes"])}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {REBUILD}.") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {REBUILD}.") from error


def _shards(folder: Path) -> list[tuple[Path, int]]:
    """List the dataset's files and their numbers of records."""
    lengths = _dataset_info(folder)["shardLengths"]
    files = [
        folder / "panoramas" / VERSION / _file_name(k, len(lengths))
        for k in range(len(lengths))
    ]
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing; {REBUILD}.")
    return list(zip(files, lengths, strict=True))
