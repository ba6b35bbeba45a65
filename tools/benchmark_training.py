"""Time the update of a training with random weights and examples, without any files:

    python tools/benchmark_training.py --config=configs/toy_city.py \\
        [--config.train.batch_size=256 ...] [--calls=4] [--profile=DIR]

The program is the trainer's own (`training.step.make_step` on the config's task, its
pool filled with random examples). A line says what an update takes, and what share of
the dense bfloat16 peak of an H100 or H200 its products are: three forward passes by
`cityrag_jax.flops`. `--profile` adds a table of where the device's time went.
"""

import collections
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from cityrag_jax import flops
from cityrag_jax.batch import latent_shape, token_grid
from cityrag_jax.checkpoint import Bundle, describe, new_model, parameters, read_config
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import keep_compilations
from cityrag_jax.training.examples import draw_batch
from cityrag_jax.training.optimizer import (
    OptimizerConfig,
    label_parameters,
    make_optimizer,
    split_frozen,
)
from cityrag_jax.training.step import init_state, make_step
from cityrag_jax.training.task import Examples
from cityrag_jax.training.tasks import MASK_CHANNELS, make_task

PEAK = 989e12  # dense bfloat16 of an H100 SXM or H200, NVIDIA's data sheet


def random_examples(config) -> Examples:
    """Draw a pool of what encoded clips look like, as large as the trainer's."""
    data, count = config.data, max(config.train.pool, config.train.batch_size)
    sizes = data.height, data.width
    t, h, w = latent_shape(data.num_frames, *sizes)
    u, _, _ = latent_shape(data.condition_frames[1], *sizes)
    z = config.model.transformer.out_channels

    def normal(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (count, *shape))

    return {
        "latents": normal(0, t, h, w, z),
        "first_frame": normal(1, t, h, w, MASK_CHANNELS + z),
        "geo_latents": normal(2, u, h, w, z),
        "geo_length": jnp.full(count, u, jnp.int32),
        "poses": normal(3, data.num_frames, 4, 4),
        "clip_id": jnp.arange(count, dtype=jnp.uint32),
        "count": np.int32(count),
    }


def count_operations(config, task) -> int:
    """Count the products of one update: forward, and twice that backward."""
    sizes, data = read_config(task.description), config.data
    batch = config.train.batch_size
    view = data.height, data.width
    tokens = int(np.prod(token_grid(latent_shape(data.num_frames, *view))))
    keys = int(np.prod(token_grid(latent_shape(data.condition_frames[1], *view))))
    parts = [
        flops.dit(sizes, tokens, batch=batch),
        flops.geo_branch(sizes, tokens, keys, batch=batch),
        flops.pose_branch(sizes, data.num_frames, batch=batch, **config.model.pose),
    ]
    return 3 * sum(flops.total(part).flops for part in parts)


def main(_) -> None:
    """Build the update, time some calls, and look inside one of them."""
    given = flags.FLAGS
    config = given.config
    keep_compilations()
    z = config.model.transformer.out_channels
    plain = dict(z_dim=z, latent_mean=(0.0,) * z, latent_std=(1.0,) * z)
    description = describe(WanVAE, VAEConfig(base_dim=4, **plain))
    start = Bundle({"vae": new_model(description, 0)}, {"vae": description})
    task = make_task(config, start)
    params = parameters(new_model(task.description, config.seed))
    options = OptimizerConfig(**config.optimizer)
    labels = label_parameters(params, options.frozen)
    optimizer = make_optimizer(options, labels, config.train.steps)
    size, updates = config.train.batch_size, config.train.updates_per_call

    def mix(pool, step):
        return task.mix(draw_batch(pool, config.seed, step, size), step)

    decay, parts = config.train.ema_decay, config.train.micro_batches
    kinds = dict(ema_decay=decay, micro_batches=parts, updates=updates)
    call = make_step(task.loss, optimizer, mix=mix, **kinds)
    pool = random_examples(config)
    params, frozen = split_frozen(params, labels)
    dtype = read_config(task.description).dtype
    frozen = {name: x.astype(dtype) for name, x in frozen.items()}
    state = init_state(params, optimizer, decay)
    began = time.monotonic()
    state, _ = jax.block_until_ready(call(state, frozen, pool))
    compiled = time.monotonic() - began
    seconds = []
    for _ in range(given.calls):
        began = time.monotonic()
        state, _ = jax.block_until_ready(call(state, frozen, pool))
        seconds.append((time.monotonic() - began) / updates)
    each = float(np.median(seconds))
    rate = count_operations(config, task) / each
    stats = jax.local_devices()[0].memory_stats() or {}
    print(
        f"{jax.devices()[0].device_kind}: batch {size}, {1e3 * each:.2f} ms an update, "
        f"{size / each:,.0f} clips/s, {rate / 1e12:.1f} TFLOP/s, "
        f"{100 * rate / PEAK:.1f} % of peak; first call {compiled:.0f} s; "
        f"{stats.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB at the peak",
        flush=True,
    )
    if given.profile:
        with jax.profiler.trace(given.profile):
            jax.block_until_ready(call(state, frozen, pool))
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


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file, such as configs/toy_city.py.", lock_config=True
    )
    flags.DEFINE_integer("calls", 4, "Calls to time behind the first.")
    flags.DEFINE_string("profile", None, "Folder for a profile of one call.")
    flags.mark_flags_as_required(["config"])
    app.run(main)
