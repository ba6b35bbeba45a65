"""JPEG tiles of panoramas as TensorFlow Datasets folders, without TensorFlow.

A record is the bytes of one tile, in a tf.train.Example, in uncompressed ArrayRecord
files with one record a group. The tile grid is that of geo/panorama.py. A level crop
reads the row around the horizon and no other, so that row stands apart: `horizon/1.0.0`
holds its 8 tiles of each panorama, `panoramas/1.0.0` the 32 others, row by row. In
cities of the form before, `panoramas` holds all 40. They are written by `shards`.
"""

import bisect
import collections
import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from cityrag_jax.data.captures import REBUILD
from cityrag_jax.data.remote import fetch, list_names
from cityrag_jax.geo.panorama import HORIZON, TILES

VERSION = "1.0.0"
OPENED = 64  # files of a dataset at once; a process may have 1024

Parts = dict[str, tuple[int, ...]]  # the tiles of a panorama that a dataset holds
APART: Parts = {
    "horizon": HORIZON,
    "panoramas": tuple(tile for tile in range(TILES) if tile not in HORIZON),
}
TOGETHER: Parts = {"panoramas": tuple(range(TILES))}


def find_parts(folder: Path) -> Parts:
    """Say which datasets a city has, and which tiles each of them holds."""
    return APART if (folder / "horizon").exists() else TOGETHER


def file_name(name: str, number: int, count: int) -> str:
    """Give the name that TensorFlow Datasets has for a file, of so many."""
    return f"{name}-train.array_record-{number:05d}-of-{count:05d}"


class Tiles:
    """The stored JPEG tiles of a city: panorama * 40 + tile, whatever they lie in."""

    def __init__(self, folder: Path):
        self._where = {}
        for name, tiles in find_parts(folder).items():
            records = Records(folder / name)
            for place, tile in enumerate(tiles):
                self._where[tile] = records, len(tiles), place

    def __getitem__(self, number: int) -> bytes:
        panorama, tile = divmod(number, TILES)
        records, count, place = self._where[tile]
        return records[panorama * count + place]


class Records:
    """The records of a dataset, by number. Safe to use from threads.

    Files are found by the dataset's own metadata. Raises ValueError, naming the file,
    where metadata or files are missing.
    """

    # One thread at a time may import the library: its lazy imports, made by several
    # threads at once, wait for each other for ever.
    _importing = threading.Lock()

    def __init__(self, dataset: Path):
        with self._importing:
            from array_record.python.array_record_module import ArrayRecordReader
            from tensorflow_datasets.proto import tf_example_pb2

        self._shards = list_files(dataset)
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
            if reader is not None:
                self._readers[shard] = reader
                return reader
        path, length = self._shards[shard]
        path = fetch(path)  # of a store: may take long, and others read on meanwhile
        with self._opening:
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


def count_panoramas(folder: Path) -> float:
    """Count the panoramas that the files of a city should hold; see that they exist.

    A fraction if some lack tiles.
    """
    parts = find_parts(folder)
    counts = [
        sum(length for _, length in list_files(folder / name)) / len(tiles)
        for name, tiles in parts.items()
    ]
    if min(counts) != max(counts):
        raise ValueError(
            f"{folder} holds {counts[0]:g} panoramas in {list(parts)[0]}/ and "
            f"{counts[-1]:g} in {list(parts)[-1]}/; {REBUILD}."
        )
    return counts[0]


def dataset_info(dataset: Path) -> dict[str, Any]:
    """Read what a dataset says of its files."""
    path = dataset / VERSION / "dataset_info.json"
    try:
        split = json.loads(path.read_text())["splits"][0]
        lengths = [int(n) for n in split["shardLengths"]]
        return {"shardLengths": lengths, "numBytes": int(split["numBytes"])}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {REBUILD}.") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {REBUILD}.") from error


def list_files(dataset: Path) -> list[tuple[Path, int]]:
    """List a dataset's files and their numbers of records."""
    lengths = dataset_info(dataset)["shardLengths"]
    there = list_names(dataset / VERSION)
    names = [file_name(dataset.name, k, len(lengths)) for k in range(len(lengths))]
    for name in names:
        if name not in there:
            raise ValueError(f"{dataset / VERSION / name} is missing; {REBUILD}.")
    files = [dataset / VERSION / name for name in names]
    return list(zip(files, lengths, strict=True))
