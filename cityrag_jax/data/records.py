"""JPEG tiles of panoramas as a TensorFlow Datasets folder, without TensorFlow.

Record panorama * 40 + tile of `panoramas/1.0.0` is the bytes of one tile, in a
tf.train.Example, in uncompressed ArrayRecord files with one record a group. The tile
grid is that of geo/panorama.py. They are written by `shards`.
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

VERSION = "1.0.0"
OPENED = 64  # files at once; a process may have 1024


def file_name(number: int, count: int) -> str:
    """Give the name that TensorFlow Datasets has for a file, of so many."""
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

        self._shards = list_files(folder)
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
    return sum(length for _, length in list_files(folder))


def dataset_info(folder: Path) -> dict[str, Any]:
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


def list_files(folder: Path) -> list[tuple[Path, int]]:
    """List the dataset's files and their numbers of records."""
    lengths = dataset_info(folder)["shardLengths"]
    files = [
        folder / "panoramas" / VERSION / file_name(k, len(lengths))
        for k in range(len(lengths))
    ]
    for file in files:
        if not file.exists():
            raise ValueError(f"{file} is missing; {REBUILD}.")
    return list(zip(files, lengths, strict=True))
