"""Time the update of a training with random weights and examples, without any files:

    python tools/benchmark_training.py --config=configs/toy_city.py \\
        [--config.train.batch_size=256 ...] [--calls=4] [--profile=DIR]

The program is the trainer's own (`training.program`), on one device, its arguments
drawn; where the config streams, the update encodes clips, by Wan's own autoencoder. A
line says what an update takes, and what share of the device's dense bfloat16 peak are
the operations that it needs, conditions as long as they may be (`training.speed`).
`--profile` adds a table of where the device's time went.
"""

import argparse
import collections
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cityrag_jax.batch import latent_frames
from cityrag_jax.checkpoint import draw_parameters, hold
from cityrag_jax.commands import Command
from cityrag_jax.parallel import keep_compilations
from cityrag_jax.training.optimizer import split_frozen
from cityrag_jax.training.program import Program, assumed_start, make_program
from cityrag_jax.training.speed import count_operations, describe_speed, peak_bytes


def draw_arguments(program: Program, config) -> list:
    """Draw what the update takes: weights as a new training has them, random clips."""
    params = draw_parameters(program.task.description, config.seed)
    params, frozen = split_frozen(params, program.labels)
    frozen = hold(frozen, program.frozen)
    encoders = program.encoders
    if config.train.pool:  # of which every clip is encoded already
        encoders = {"text": encoders["text"]}
    encoders, batch = jax.jit(lambda: draw_like((encoders, program.batch)))()
    return [program.begin(params), frozen, encoders, set_counts(batch, config)]


def draw_like(abstract):
    """Draw normal numbers of deviation 0.02, and any integers, of these shapes."""
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def draw(key, x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return (0.02 * jax.random.normal(key, x.shape)).astype(x.dtype)
        return jax.random.bits(key, x.shape, f"uint{8 * x.dtype.itemsize}").astype(
            x.dtype
        )

    return jax.tree.unflatten(tree, map(draw, keys, leaves))


def set_counts(batch, config):
    """Let every condition be as long as it may, and the pool be full."""
    longest = config.data.condition_frames[1]
    values = {
        "condition_length": longest,
        "geo_length": latent_frames(longest),
        "count": max(config.train.pool, config.train.batch_size),
    }

    def set_count(path, x):
        name = jax.tree_util.keystr(path, simple=True)
        return jnp.full_like(x, values[name]) if name in values else x

    return jax.tree_util.tree_map_with_path(set_count, batch)


def main(given: argparse.Namespace) -> None:
    """Build the update, time some calls, and look inside one of them."""
    config = given.config
    keep_compilations()
    program = make_program(config, None, assumed_start(config))
    size, updates = config.train.batch_size, config.train.updates_per_call
    state, *others = draw_arguments(program, config)

    def call(state):
        return jax.block_until_ready(program.update(state, *others))

    began = time.monotonic()
    state, _ = call(state)
    compiled = time.monotonic() - began
    seconds = []
    for _ in range(given.calls):
        began = time.monotonic()
        state, _ = call(state)
        seconds.append((time.monotonic() - began) / updates)
    each = float(np.median(seconds))
    operations = count_operations(config, program, config.data.condition_frames[1])
    speed = describe_speed(operations, 1, each)
    share = f"{100 * speed['mfu']:.1f} % of peak; " if "mfu" in speed else ""
    print(
        f"{jax.devices()[0].device_kind}: batch {size}, {1e3 * each:.2f} ms an update, "
        f"{size / each:,.0f} clips/s, {operations / each / 1e12:.1f} TFLOP/s, {share}"
        f"first call {compiled:.0f} s; {peak_bytes() / 2**30:.1f} GiB at the peak",
        flush=True,
    )
    if given.profile:
        with jax.profiler.trace(given.profile):
            call(state)
        print_kernels(Path(given.profile), updates)


def print_kernels(folder: Path, updates: int, rows: int = 40) -> None:
    """Sum the device's time by kernel, milliseconds an update, longest first."""
    (trace,) = sorted(folder.rglob("*.xplane.pb"))[-1:]
    times, counts = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = re.sub(r"[._]\d+$", "", event.name)[:70]
                times[name] += event.duration_ns
                counts[name] += 1
    total = sum(times.values())
    print(f"{total / 1e6 / updates:8.3f} ms in {sum(counts.values()) / updates:.0f}")
    for name, spent in times.most_common(rows):
        print(f"{spent / 1e6 / updates:8.3f} ms {counts[name] / updates:6.1f}  {name}")


COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.takes("--calls", type=int, default=4, help="to time behind the first")
COMMAND.takes("--profile", help="folder for a profile of one call")

if __name__ == "__main__":
    COMMAND.run(main)
