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
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from google.protobuf.message import DecodeError
from jaxtyping import UInt8

from cityrag_jax.data.captures import REBUILD
from cityrag_jax.geo import panorama

VERSION = "1.0.0"
FILE_BYTES = 1 << 30


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


def encode_ahead(
    panoramas: Iterator[np.ndarray], quality: int, pool: ThreadPoolExecutor
) -> Iterator[bytes]:
    """Encode ahead in threads, in order, with a bounded number in flight."""
    waiting = collections.deque()
    for picture in panoramas:
        waiting.append(pool.submit(encode_panorama, picture, quality))
        if len(waiting) > 32:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def write_records(folder: Path, records: Iterator[bytes]) -> None:
    """Store records in order, in files of about `FILE_BYTES`, with their metadata.

    Written file by file: a TensorFlow Datasets builder collects everything first, in
    memory up to 1 GB and beyond that by TensorFlow.
    """
    path = folder / "panoramas" / VERSION
    path.mkdir(parents=True)
    lengths, num_bytes = [], 0
    records = iter(records)
    while taken := _write_file(path / f"{len(lengths):05d}", records):
        lengths.append(taken[0])
        num_bytes += taken[1]
    for k in range(len(lengths)):
        os.replace(path / f"{k:05d}", path / _file_name(k, len(lengths)))
    _write_metadata(path, lengths, num_bytes)


def _write_file(path: Path, records: Iterator[bytes]) -> tuple[int, int] | None:
    """Fill one file; give its records and bytes, None when no record is left."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    record = next(records, None)
    if record is None:
        return None
    # JPEG does not shrink: one record a group, uncompressed, is read by itself.
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
    count = num_bytes = 0
    while record is not None:
        example = tf_example_pb2.Example()
        example.features.feature["jpeg"].bytes_list.value.append(record)
        writer.write(example.SerializeToString())
        count, num_bytes = count + 1, num_bytes + len(record)
        record = next(records, None) if num_bytes < FILE_BYTES else None
    writer.close()
    return count, num_bytes


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

        shards = _shards(folder)
        self._stops = list(itertools.accumulate(length for _, length in shards))
        self._readers = [
            ArrayRecordReader(
                os.fspath(path),
                options="readahead_buffer_size:0,max_parallelism:0",
                file_reader_buffer_size=32768,
            )
            for path, _ in shards
        ]
        self._example = tf_example_pb2.Example

    def __getitem__(self, number: int) -> bytes:
        shard = bisect.bisect_right(self._stops, number)
        place = number - (self._stops[shard - 1] if shard else 0)
        # A range of one takes 7 us; a list of one, which data sources ask for, takes
        # time in proportion to the file's records: 350 us for 100,000.
        try:
            (record,) = self._readers[shard].read(place, place + 1)
            example = self._example.FromString(record)
        except (IndexError, RuntimeError, DecodeError) as error:
            raise ValueError(f"record {number} is damaged ({error})") from error
        return example.features.feature["jpeg"].bytes_list.value[0]


def count_records(folder: Path) -> int:
    """Count the records that the files of a city should hold; see that they exist."""
    return sum(length for _, length in _shards(folder))


def _shards(folder: Path) -> list[tuple[Path, int]]:
    """List the dataset's files and their numbers of records."""
    path = folder / "panoramas" / VERSION / "dataset_info.json"
    try:
        document = json.loads(path.read_text())
        lengths = [int(n) for n in document["splits"][0]["shardLengths"]]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {REBUILD}.") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {REBUILD}.") from error
    shards = []
    for k, length in enumerate(lengths):
        name = _file_name(k, len(lengths))
        if not (path.parent / name).exists():
            raise ValueError(f"{path.parent / name} is missing; {REBUILD}.")
        shards.append((path.parent / name, length))
    return shards
