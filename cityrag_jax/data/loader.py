"""From clips to endless batches in the host's memory, by threads and worker processes.

Grain's, by index from end to end: the clips of a step, and which row each has, follow
from the seed and the step alone, for any number of processes, threads and workers.
"""

from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int64

from cityrag_jax.batch import Clip
from cityrag_jax.data.clips import ClipConfig, make_clip, plan_clip
from cityrag_jax.data.pairs import Pairs
from cityrag_jax.data.store import City

IN_PASSING = 4  # clips that a worker holds in hand, in shared memory and at both ends


class DrawClip(grain.transforms.RandomMap):
    """Random map from the number of a pair, over all cities, to a clip."""

    def __init__(self, sources: Sequence[tuple[City, Pairs]], config: ClipConfig):
        self._sources = tuple(sources)
        self._config = config
        self._stops = np.cumsum([len(pairs) for _, pairs in sources])

    def random_map(self, element: int, rng: np.random.Generator) -> Clip:
        source = int(np.searchsorted(self._stops, element, "right"))
        city, pairs = self._sources[source]
        pair = int(element) - (int(self._stops[source - 1]) if source else 0)
        plan = plan_clip(city, pairs, pair, self._config, rng)
        return make_clip(city, plan, self._config)


class Rows(grain.MapDataset):
    """Of consecutive batches of `size` elements, only some rows of each."""

    def __init__(self, parent: grain.MapDataset, rows: Sequence[int], size: int):
        super().__init__(parent)
        self._rows = rows
        self._size = size

    def __len__(self):
        return len(self._parent) // self._size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._size + self._rows[row]]


class Repeated(grain.MapDataset):
    """The first `count` elements again and again, as they were drawn."""

    def __init__(self, parent: grain.MapDataset, count: int):
        super().__init__(parent)
        self._count = count

    def __len__(self):
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[index % self._count]


def training_clips(
    sources: Sequence[tuple[City, Pairs]],
    config: ClipConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | Int64[np.ndarray, " rows"] | None = None,
    num_threads: int = 4,
    num_workers: int = 0,
    first_clips: int = 0,
) -> grain.DatasetIterator:
    """Give this process's rows of endless batches of clips, from `start_step` on.

    `batch_size` is that of all processes together, `rows` those that this one feeds
    (None: all); `first_clips` above 0 repeats so many. To resume, the step is enough.
    Two batches wait in the host's memory, or five clips of each worker where that is
    more. Close the iterator when done.
    """
    total = sum(len(pairs) for _, pairs in sources)
    if total == 0:
        names = ", ".join(str(city.folder) for city, _ in sources)
        raise ValueError(f"No training pairs in {names or 'no city'}; mine some.")
    clips = grain.MapDataset.range(total).seed(seed).shuffle().repeat()
    # Drawing before the choice of rows makes a clip independent of the processes.
    clips = clips.random_map(DrawClip(sources, config))
    if first_clips:
        clips = Repeated(clips, first_clips)
    mine = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    clips, count = Rows(clips, mine, batch_size), len(mine)
    # Clips go through threads and workers, in turn: batches would be too many at once.
    ahead = 2 * count
    if num_workers:
        ahead = max(1, -(-ahead // num_workers) - IN_PASSING)
    options = grain.ReadOptions(min(num_threads, ahead), prefetch_buffer_size=ahead)
    clips = clips[start_step * count :].to_iter_dataset(options)
    if num_workers:
        _mark_flags_as_parsed()
        clips = clips.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=1
            )
        )
    return iter(clips.batch(count, drop_remainder=True))


def _mark_flags_as_parsed() -> None:
    """Let Grain 0.2.18's workers start where absl has parsed no flags (grain #1355)."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
