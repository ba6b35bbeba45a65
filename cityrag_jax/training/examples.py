"""From cities to batches on the device: streamed, or drawn from a pool kept there.

A pool is encoded once: a toy model trains faster than any loader feeds it. Pool, stream
and held-out clips follow from config and step alone, so a resumed training sees what an
uninterrupted one would have seen.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.data.clips import (
    ClipConfig,
    held_out_clips,
    stack_clips,
    training_clips,
)
from cityrag_jax.data.pairs import Pairs, load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.training.tasks import Examples, Task

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
    sources = [(City(name), load_pairs(name)) for name in names]
    for city, _ in sources:
        city.check_pictures()
    return sources


def clip_config(config: ConfigDict) -> ClipConfig:
    """Read the sizes of clips off the data section."""
    names = ClipConfig.__dataclass_fields__
    return ClipConfig(**{name: config[name] for name in names})


def stream(
    sources: Sources, config: ConfigDict, first_step: int, mesh: Mesh | None
) -> Iterator[Clip]:
    """Give batches of training clips on the device from `first_step` on, for ever."""
    batches = training_clips(
        [(city, pairs.training) for city, pairs in sources],
        clip_config(config.data),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=first_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
        num_workers=config.data.workers,
    )
    return (place(clip, mesh) for clip in batches)


def fill_pool(
    task: Task, sources: Sources, config: ConfigDict, mesh: Mesh | None
) -> Examples:
    """Encode `train.pool` clips, rounded up to whole batches, to stay on the device."""
    count = -(-config.train.pool // config.train.batch_size)
    batches = stream(sources, config, 0, mesh)
    bar = tqdm.tqdm(
        total=count, desc="encoding clips", unit="batch", dynamic_ncols=True
    )
    parts = []
    with bar:
        for _ in range(count):
            parts.append(jax.block_until_ready(task.encode(next(batches))))
            bar.update()
    return {name: jnp.concatenate([p[name] for p in parts]) for name in parts[0]}


def draw_batch(
    pool: Examples, seed: int, step: Int32[Array, ""], size: int
) -> Examples:
    """Draw `size` different examples, by seed and step."""
    key = jax.random.fold_in(jax.random.key(seed + 1), step)
    chosen = jax.random.permutation(key, len(pool["clip_id"]))[:size]
    return {name: x[chosen] for name, x in pool.items()}


def held_out_examples(
    task: Task, sources: Sources, config: ConfigDict, mesh: Mesh | None
) -> list[Examples]:
    """Encode `eval.clips` held-out clips, shared among the cities, in batches."""
    share = -(-config.eval.clips // len(sources))
    clips = [
        clip
        for city, pairs in sources
        for clip in held_out_clips(
            city,
            pairs,
            clip_config(config.data),
            share,
            seed=config.eval.seed,
            min_rotation_deg=config.eval.min_rotation_deg,
        )
    ][: config.eval.clips]
    size = min(config.train.batch_size, config.eval.clips)
    groups = [clips[i : i + size] for i in range(0, len(clips), size)]
    return [task.encode(place(stack_clips(group), mesh)) for group in groups]


def place(clip: Clip, mesh: Mesh | None) -> Clip:
    """Put this process's share of a batch on its devices."""
    if mesh is None:
        return clip
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), clip
    )
