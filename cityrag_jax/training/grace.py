"""Whether a training can save before a scheduler that takes its machine kills it."""

import os
import time
from pathlib import Path

import jax
from jaxtyping import PyTree

from cityrag_jax.training.losses import Losses

PROBE_BYTES = 2**26
GIB = 2**30


def describe_grace(
    state: PyTree, workdir: Path, call_s: float, grace_s: float
) -> str | None:
    """Say so if the running updates and a save take longer than the grace.

    A call of the update takes `call_s`, and as many as the host runs ahead must end.
    The save is what this process holds of the state, at the speed of a file of 64 MiB
    written to the workdir: an estimate, copying from the devices not counted.
    """
    size = sum(
        shard.data.nbytes
        for x in jax.tree.leaves(state)
        for shard in x.addressable_shards
        if shard.replica_id == 0
    )
    save_s = size * measure_writing(workdir)
    ends_s = (1 + Losses.AHEAD) * call_s
    if ends_s + save_s <= grace_s:
        return None
    return (
        f"Of the {grace_s:.0f} s that the scheduler grants, running updates take "
        f"{ends_s:.1f} s and saving {size / GIB:.2f} GiB some {save_s:.1f} s: a "
        "checkpoint may not be whole in time, and the one before is then gone on from. "
        "Ask for more, or set config.train.checkpoint_minutes."
    )


def measure_writing(folder: Path) -> float:
    """Give the seconds that a byte takes to reach the disk under `folder`."""
    path = folder / f".probe-{os.getpid()}"
    content = os.urandom(PROBE_BYTES)
    began = time.monotonic()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return (time.monotonic() - began) / PROBE_BYTES
