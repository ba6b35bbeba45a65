"""Encoded clips on disk: what the frozen encoders make of a training's clips, once.

A folder holds the first clips of a training's stream in its order, so that a training
reads what it would have encoded: `latents.json` says of what data, seed
and autoencoder, `NNNNN.safetensors` are `shard_clips` clips each. Every array has a
row a clip and, as NAME.crc32, the checksum of each row, which is verified when it is
read. A file appears by being renamed, whole; what is there is not made again. When
captures are taken out of a city, the clips that show them go (`without_clips`).
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import Arrays, Damaged, parameters
from cityrag_jax.checkpoint.digests import sum_arrays
from cityrag_jax.files import write_whole
from cityrag_jax.parallel import batch_share, place_batch
from cityrag_jax.training.examples import Sources, stream
from cityrag_jax.training.task import Encoders, Examples

RECORD = "latents.json"
CRC = ".crc32"
FREE = ("city", "threads", "workers")  # of the data section, what may differ
AHEAD = 2  # batches read before they are asked for


def describe_latents(
    config: ConfigDict, sources: Sources, encoders: Encoders
) -> dict[str, Any]:
    """Say of what latents are made: cities, clips, seed, and the sums of encoders."""
    data = {k: v for k, v in config.data.to_dict().items() if k not in FREE}
    sums = {
        name: sum(sum_arrays(parameters(module)).values()) % 2**32
        for name, module in encoders.items()
        if name != "text"
    }
    pairs = {city.name: len(pairs.training) for city, pairs in sources}
    described = dict(data=data, pairs=pairs, seed=config.seed, encoders=sums)
    return json.loads(json.dumps(described))


def write_latents(
    folder: Path,
    config: ConfigDict,
    encode: Callable[[Clip], Examples],
    sources: Sources,
    record: dict[str, Any],
    *,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> None:
    """Encode `record["clips"]` clips into shards, those that are missing.

    Of n who work side by side number i makes its part of the shards: `share` (i, n).
    `record` has clips, shard_clips and dtype beside `describe_latents`. Raises
    ValueError if the folder holds other latents.
    """
    _claim(folder, record)
    size, of_shard = config.train.encode_batch, record["shard_clips"]
    shards = np.array_split(np.arange(-(-record["clips"] // of_shard)), share[1])
    mine = shards[share[0]].tolist()
    batches, at = None, -1
    for number in progress([n for n in mine if not _shard(folder, n).exists()]):
        first = number * of_shard
        if first != at:
            batches = stream(sources, config, first // size, None, size)
        count = min(of_shard, record["clips"] - first)
        made = [jax.device_get(encode(next(batches))) for _ in range(-(-count // size))]
        at = first + len(made) * size
        arrays = {
            name: np.concatenate([batch[name] for batch in made])[:count]
            for name in made[0]
        }
        _write_shard(_shard(folder, number), arrays, record["dtype"])


def _claim(folder: Path, record: dict[str, Any]) -> None:
    path = folder / RECORD
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _compare(json.loads(path.read_text()), record, folder, "choose another --out")
        return
    write_whole(path, json.dumps(record, indent=1) + "\n")


def _compare(stored: dict, wanted: dict, folder: Path, remedy: str) -> None:
    lines = []
    for key, value in wanted.items():
        there = stored.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            lines += [
                f"{key}.{k}: {there.get(k)!r} there, {value.get(k)!r} here"
                for k in there.keys() | value.keys()
                if there.get(k) != value.get(k)
            ]
        elif there != value:
            lines.append(f"{key}: {there!r} there, {value!r} here")
    if lines:
        raise ValueError(
            f"{folder} holds other latents:\n  "
            + "\n  ".join(sorted(lines))
            + f"\nUse the config, cities and encoders of those, or {remedy}."
        )


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"


def _write_shard(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    """Write by rename; floating arrays in `dtype`."""
    kept = {
        name: x.astype(jnp.dtype(dtype)) if x.dtype == np.float32 else x
        for name, x in arrays.items()
    }
    sums = {
        name + CRC: np.array([_crc32(x[i : i + 1]) for i in range(len(x))], np.uint32)
        for name, x in kept.items()
    }
    write_whole(path, safetensors.numpy.save(kept | sums))


def _crc32(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


class Latents:
    """A folder of latents, whole, to read batches from."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / RECORD
        if not path.exists():
            raise ValueError(
                f"train.latents: {path} is missing; make the folder with "
                "tools/encode_latents.py."
            )
        try:
            self.record = json.loads(path.read_text())
            self.clips, self._size = self.record["clips"], self.record["shard_clips"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); encode anew.") from error
        numbers = range(-(-self.clips // self._size))
        missing = [n for n in numbers if not _shard(self.folder, n).exists()]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(numbers)} shards, first "
                f"{_shard(self.folder, missing[0]).name}; go on with "
                "tools/encode_latents.py."
            )

    def check(self, described: dict[str, Any], wanted: Arrays) -> None:
        """Raise ValueError if they were made of other data, or do not fit a batch."""
        _compare(self.record, described, self.folder, "encode them anew")
        found = {name: x.shape[1:] for name, x in self.read([0]).items()}
        shapes = {name: x.shape[1:] for name, x in wanted.items()}
        if found != shapes:
            raise ValueError(
                f"{self.folder} holds {found}, this config needs {shapes}; encode the "
                "clips anew with it."
            )

    def read(self, numbers: list[int]) -> dict[str, np.ndarray]:
        """Read clips by number; raises `Damaged` for one whose checksum differs."""
        rows = []
        for number in numbers:
            path = _shard(self.folder, number // self._size)
            with safetensors.safe_open(path, framework="numpy") as file:
                names = [n for n in file.keys() if not n.endswith(CRC)]
                place = slice(number % self._size, number % self._size + 1)
                row = {n: file.get_slice(n)[place] for n in names}
                sums = {n: file.get_slice(n + CRC)[place] for n in names}
            broken = [n for n, x in row.items() if _crc32(x) != int(sums[n][0])]
            if broken:
                raise Damaged(
                    f"{path} is damaged: {', '.join(broken)} of clip {number}. Delete "
                    "the file and repeat tools/encode_latents.py."
                )
            rows.append(row)
        return {n: np.concatenate([row[n] for row in rows]) for n in rows[0]}

    def batches(
        self, config: ConfigDict, first: int, mesh: Mesh | None
    ) -> Iterator[Examples]:
        """Give the batches of updates from `first` on: the stream's, over and over."""
        size = config.train.batch_size
        count = min(self.clips, config.train.overfit or self.clips)
        rows = batch_share(mesh, size)

        def read(step):
            found = self.read([int(step * size + row) % count for row in rows])
            return {
                n: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
                for n, x in found.items()
            }

        with ThreadPoolExecutor(AHEAD) as readers:
            waiting = [readers.submit(read, first + n) for n in range(AHEAD)]
            step = first + AHEAD
            while True:
                batch = waiting.pop(0).result()
                waiting.append(readers.submit(read, step))
                step += 1
                yield place_batch(batch, mesh, size)


def without_clips(
    folder: Path, city: str, names: dict[int, int | None]
) -> tuple[Path, int]:
    """Copy latents to a folder beside, without those of a city's clips that go.

    `names` gives for each clip of the city its number from now on, None for one that
    goes. Gives that folder and how many clips it lacks. Behind it the clips are no
    longer the first of a training's stream, but all are clips of it. Raises ValueError
    where the city's clips cannot be told: of an encoding that was not finished, or of
    other pairs than `names` are.
    """
    latents = Latents(folder)
    record = latents.record
    if record["pairs"][city] != len(names):
        raise ValueError(
            f"{folder} is of {record['pairs'][city]} pairs of {city}, which has "
            f"{len(names)} now."
        )
    target = folder.with_name(f".{folder.name}.takedown")
    shutil.rmtree(target, ignore_errors=True)  # of one that was killed
    target.mkdir()
    try:
        kept = _copy_clips(latents, target, names)
    except ValueError:  # damaged
        shutil.rmtree(target)
        raise
    left = sum(name is not None for name in names.values())
    gone = record.get("taken_down", 0) + latents.clips - kept
    record |= dict(clips=kept, taken_down=gone, pairs=record["pairs"] | {city: left})
    write_whole(target / RECORD, json.dumps(record, indent=1) + "\n")
    return target, latents.clips - kept


def _copy_clips(latents: Latents, target: Path, names: dict[int, int | None]) -> int:
    """Copy clips, but those named None, under their new numbers; count them."""
    rows, kept, of_shard = [], 0, latents.record["shard_clips"]
    for number in range(latents.clips):
        row = latents.read([number])
        name = names.get(int(row["clip_id"][0]), int(row["clip_id"][0]))
        if name is not None:
            rows.append(row | {"clip_id": np.full_like(row["clip_id"], name)})
        if len(rows) == of_shard or (rows and number + 1 == latents.clips):
            joined = {n: np.concatenate([row[n] for row in rows]) for n in rows[0]}
            path = _shard(target, kept // of_shard)
            _write_shard(path, joined, latents.record["dtype"])
            rows, kept = [], kept + len(rows)
    return kept
