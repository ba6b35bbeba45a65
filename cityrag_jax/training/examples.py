"""From cities to batches on the device: streamed, or drawn from a pool kept there.

A toy model trains faster than any loader feeds it: clips stay on the device, encoded,
while new ones join and the oldest leave. Pool, stream and held-out clips follow from
config and step alone, so a resumed training sees what an uninterrupted one would have
seen.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.data.clips import (
    ClipConfig,
    ClipPlan,
    held_out_plans,
    make_clip,
    stack_clips,
)
from cityrag_jax.data.loader import training_clips
from cityrag_jax.data.pairs import Pairs, load_pairs
from cityrag_jax.data.remote import origin_of
from cityrag_jax.data.store import City
from cityrag_jax.parallel import (
    axis_size,
    batch_axes,
    batch_share,
    is_writer,
    place_batch,
    shard,
)
from cityrag_jax.progress import Progress
from cityrag_jax.training.log import announce
from cityrag_jax.training.task import Examples

Sources = list[tuple[City, Pairs]]


def open_cities(folders: str) -> Sources:
    """Open the cities named in `data.city`, and look at some of their pictures.

    Folders are separated by commas. Raises ValueError for whatever is damaged.
    """
    names = [name for name in folders.split(",") if name]
    if not names:
        raise ValueError(
            "config.data.city is empty; give --config.data.city=DIR[,DIR...]. Build "
            "the toy city with tools/build_city.py."
        )
    sources = [(city, load_pairs(city.folder)) for city in map(City, names)]
    for city, _ in sources:
        # Of a store's each may cost a file of tiles that training never reads.
        city.check_pictures(1 if origin_of(city.folder) else 16)
    return sources


def clip_config(config: ConfigDict) -> ClipConfig:
    """Read the sizes of clips off the data section."""
    names = ClipConfig.__dataclass_fields__
    return ClipConfig(**{name: config[name] for name in names})


def stream(
    sources: Sources,
    config: ConfigDict,
    first: int,
    mesh: Mesh | None,
    size: int | None = None,
) -> Iterator[Clip]:
    """Give batches of training clips on the device from the `first` on, for ever.

    They hold `size` clips, or as many as an update takes.
    """
    size = size or config.train.batch_size
    batches = training_clips(
        [(city, pairs.training) for city, pairs in sources],
        clip_config(config.data),
        batch_size=size,
        seed=config.seed,
        start_step=first,
        rows=batch_share(mesh, size),
        num_threads=config.data.threads,
        num_workers=config.data.workers,
        first_clips=config.train.overfit,
    )
    return (place_batch(clip, mesh, size) for clip in _with_cure(batches))


def _with_cure(batches: Iterator[Clip]) -> Iterator[Clip]:
    """Say what to do if a process that loads clips is killed, as for its memory."""
    try:
        yield from batches
    except RuntimeError as error:  # Grain's
        if "Worker process was terminated" not in str(error):
            raise
        reason = str(error).split(".")[0].removeprefix("Worker process was ")
        raise ValueError(
            f"A data worker ended while it loaded clips ({reason}). A machine without "
            "memory kills so (-9): lower config.data.workers; the same command goes on "
            "from the last checkpoint."
        ) from error


class Waiting:
    """An iterator that counts the seconds spent waiting for it."""

    def __init__(self, iterator: Iterator):
        self._iterator = iterator
        self._seconds = 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        began = time.monotonic()
        try:
            return next(self._iterator)
        finally:
            self._seconds += time.monotonic() - began

    def take_seconds(self) -> float:
        """Give the seconds since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Pool:
    """Encoded clips on the device, renewed as the training goes on.

    Batch k of the stream, `encode_batch` clips, lies at place k modulo the pool's size:
    the pool grows from `pool_start` clips (0: full at once) to `pool`, then the oldest
    leave. Before each call of `updates_per_call` updates but the first, `fresh` join.
    """

    def __init__(
        self,
        encode: Callable[[Clip], Examples],
        sources: Sources,
        config: ConfigDict,
        mesh: Mesh | None,
        first_step: int,
    ):
        train = config.train
        size = train.encode_batch
        self._places = pool_size(config) // size
        start = min(-(-train.pool_start // size) or self._places, self._places)
        self._fresh = train.fresh // size
        joined = start + first_step // train.updates_per_call * self._fresh
        self._next = max(0, joined - self._places)
        clips = stream(sources, config, self._next, mesh, size)
        self._encoded = map(encode, clips)
        self._examples = None
        announce(f"encoding the first {(joined - self._next) * size} clips of the pool")
        wanted = joined - self._next
        with Progress("encoding clips", wanted, "batch", shown=is_writer()) as bar:
            while self._next < joined:
                jax.block_until_ready(self._join())
                bar.update()
        self._started = False

    def __iter__(self) -> Iterator[Examples]:
        return self

    def __next__(self) -> Examples:
        """Let fresh clips join; give all examples and, as `count`, how many are there.

        The arrays given before are taken over (donated).
        """
        for _ in range(self._fresh if self._started else 0):
            self._join()
        self._started = True
        return self._examples

    def _join(self) -> Examples:
        batch = next(self._encoded)
        size = len(batch["clip_id"])
        if self._examples is None:
            rows = size * self._places
            self._examples = {
                name: jnp.zeros((rows, *x.shape[1:]), x.dtype, device=x.sharding)
                for name, x in batch.items()
            }
        place = self._next % self._places
        count = min(self._next + 1, self._places) * size
        self._examples.pop("count", None)
        self._examples = insert_batch(self._examples, batch, np.int32(place * size))
        self._examples["count"] = np.int32(count)
        self._next += 1
        return self._examples


@functools.partial(jax.jit, donate_argnums=0)
def insert_batch(pool: Examples, batch: Examples, row: Int32[Array, ""]) -> Examples:
    """Overwrite the pool from `row` on. Each device takes the rows that it holds.

    Left to the partitioner, every device would gather the whole pool.
    """
    axes = batch_axes()
    if math.prod(map(axis_size, axes)) == 1:
        return jax.tree.map(functools.partial(_overwrite, first=row), pool, batch)

    def overwrite(pool, batch, row):
        here = jax.lax.axis_index(axes)
        return {
            name: _overwrite(
                x,
                jax.lax.all_gather(batch[name], axes, tiled=True),
                first=row - here * len(x),
            )
            for name, x in pool.items()
        }

    rows, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(overwrite, in_specs=(rows, rows, whole), out_specs=rows)(
        pool, batch, row
    )


def _overwrite(x: Array, new: Array, *, first: Int32[Array, ""]) -> Array:
    """Write `new` into rows of `x`; those before and behind it are left out."""
    places = first + jnp.arange(len(new))
    places = jnp.where(places < 0, len(x), places)
    return x.at[places].set(new, mode="drop", unique_indices=True)


def draw_batch(
    pool: Examples, seed: int, step: Int32[Array, ""], size: int
) -> Examples:
    """Draw `size` different examples by seed and step: one of each equal share."""
    pool = dict(pool)
    count = pool.pop("count")
    key = jax.random.fold_in(jax.random.key(seed + 1), step)
    edges = jnp.arange(size + 1) * count // size
    chosen = jax.random.randint(key, (size,), edges[:-1], edges[1:])
    drawn = {name: x[chosen] for name, x in pool.items()}
    return {n: shard(x, "batch", *(None,) * (x.ndim - 1)) for n, x in drawn.items()}


def pool_size(config: ConfigDict) -> int:
    """Count the places of the pool: whole batches of `encode_batch` clips."""
    size = config.train.encode_batch
    return -(-config.train.pool // size) * size


def clips_at_once(config: ConfigDict) -> int:
    """Count the held-out clips of a batch: those of a part of training's, which fit."""
    train = config.train
    part = train.batch_size // train.micro_batches
    return min(train.encode_batch if train.pool else part, config.eval.clips)


def plan_held_out(sources: Sources, config: ConfigDict) -> list[tuple[City, ClipPlan]]:
    """Plan the `eval.clips` held-out clips, shared among the cities."""
    share = -(-config.eval.clips // len(sources))
    limits = dict(seed=config.eval.seed, min_rotation_deg=config.eval.min_rotation_deg)
    plans = [
        (city, plan)
        for city, pairs in sources
        for plan in held_out_plans(
            city, pairs, clip_config(config.data), share, **limits
        )
    ]
    return plans[: config.eval.clips]


def held_out_examples(
    encode: Callable[[Clip], Examples],
    sources: Sources,
    config: ConfigDict,
    mesh: Mesh | None,
) -> list[Examples]:
    """Encode `eval.clips` held-out clips, shared among the cities, in batches.

    Where the training repeats the same clips, encode these instead.
    """
    if config.train.overfit:
        size = clips_at_once(config)
        count = -(-config.train.overfit // size)
        batches = stream(sources, config, 0, mesh, size)
        return [encode(next(batches)) for _ in range(count)]
    clips, plans = clip_config(config.data), plan_held_out(sources, config)
    size = clips_at_once(config)
    rows = batch_share(mesh, size)
    batches = []
    for first in range(0, len(plans), size):
        mine = [make_clip(*plans[first + row], clips) for row in rows]
        batch = place_batch(stack_clips(mine), mesh, size)
        batches.append(encode(batch))
    return batches
