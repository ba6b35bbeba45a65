"""Time how a checkpoint is read onto this machine's devices, and one denoising step.

    python tools/time_checkpoint.py --checkpoint=DIR [--fsdp=4] [--sequence=1]
        [--frames=73 --height=480 --width=832] [--no-step]
        [--distributed]

Reads every module of the folder, each device its own shards, and prints seconds, GB/s,
what the process asked of files and its peak memory on the host (anonymous memory: the
page cache is not counted). Then the transformer takes one step from noise with random
conditions at the size of the video. Several processes share one mesh: start each with
--distributed, and on one host with its own CUDA_VISIBLE_DEVICES.
"""

import argparse
import contextlib
import json
import re
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from cityrag_jax.batch import Conditions, latent_shape
from cityrag_jax.checkpoint import TRUST, latest_model, parameters, trust
from cityrag_jax.commands import Command
from cityrag_jax.parallel import DISTRIBUTED, initialise, make_mesh
from cityrag_jax.sampling import Sampler

GB, GIB = 1e9, 2**30


class PeakMemory:
    """Watches this process's anonymous memory while the context is open."""

    def __enter__(self):
        self.before = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def anonymous_bytes() -> int:
    """Read RssAnon of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)) * 1024


def bytes_asked() -> int:
    """Read how many bytes this process has read, cached or not (Linux)."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def read(checkpoint: Path, mesh, dtype) -> tuple[dict[str, nnx.Module], dict]:
    """Read every module; give them and the figures."""
    bundle = latest_model(checkpoint, mesh=mesh, dtype=dtype)
    start, asked = time.perf_counter(), bytes_asked()
    with PeakMemory() as memory:
        modules = {name: bundle.modules[name] for name in bundle.modules}
        arrays = [x for m in modules.values() for x in parameters(m).values()]
        jax.block_until_ready(arrays)
    seconds = time.perf_counter() - start
    size = sum(x.nbytes for x in arrays)
    return modules, {
        "modules": sorted(modules),
        "read_s": round(seconds, 2),
        "gigabytes": round(size / GB, 2),
        "read_by_this_process": round((bytes_asked() - asked) / GB, 2),
        "gigabytes_per_s": round(size / GB / seconds, 2),
        "host_peak_gib": round(memory.peak / GIB, 2),
        "host_before_gib": round(memory.before / GIB, 2),
        "per_device_gib": [
            round((d.memory_stats() or {}).get("bytes_in_use", 0) / GIB, 2)
            for d in jax.local_devices()
        ],
    }


def random_conditions(transformer, frames: int, grid, key) -> Conditions:
    """Draw all conditions that a transformer with both branches is told."""
    c, (t, h, w) = transformer.config, grid
    keys = iter(jax.random.split(key, 5))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    poses = jnp.broadcast_to(jnp.eye(4), (1, frames, 4, 4))
    return Conditions(
        text=normal(1, c.text_len, c.text_dim),
        image=None if c.image_dim is None else normal(1, 257, c.image_dim),
        first_frame=None
        if c.in_channels == c.out_channels
        else normal(1, t, h, w, c.in_channels - c.out_channels),
        geo_latents=normal(1, t, h, w, c.out_channels),
        geo_length=jnp.full(1, t, jnp.int32),
        keep_geo=jnp.ones(1),
        poses=poses,
        keep_pose=jnp.ones(1),
        geo_poses=poses,
    )


def step(transformer, frames: int, grid) -> dict:
    """Denoise by one step, compiled first, and say how long it took."""
    key = jax.random.key(0)
    conditions = random_conditions(transformer, frames, grid, key)
    noise = jax.random.normal(key, (1, *grid, transformer.config.out_channels))
    sampler = Sampler(num_steps=1, guidance="none", scales=())
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        latents = jax.block_until_ready(sampler(transformer, conditions, noise))
        seconds.append(round(time.perf_counter() - start, 3))
    finite = bool(jnp.isfinite(latents).all())
    return {"step_s": seconds[1:], "first_step_s": seconds[0], "finite": finite}


COMMAND = Command(__doc__)
COMMAND.needs("--checkpoint", type=Path, help="model folder or training workdir")
COMMAND.takes("--fsdp", type=int, default=1, help="ways to split parameters")
COMMAND.takes("--sequence", type=int, default=1, help="ways to split tokens")
COMMAND.takes(
    "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to compute in"
)
COMMAND.takes("--frames", type=int, default=73, help="of the video")
COMMAND.takes("--height", type=int, default=480, help="of the video")
COMMAND.takes("--width", type=int, default=832, help="of the video")
COMMAND.switch("--distributed", DISTRIBUTED)
COMMAND.switch("--trust", TRUST)
COMMAND.switch("--no-step", "only read")


def main(given: argparse.Namespace) -> None:
    """Read, step, print one line of JSON."""
    initialise(given.distributed)
    trust(given.trust)
    count = given.fsdp * given.sequence
    devices = jax.devices()[:count]
    mesh = make_mesh(1, given.fsdp, given.sequence, devices) if count > 1 else None
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        modules, figures = read(given.checkpoint, mesh, jnp.dtype(given.dtype))
        if not given.no_step:
            grid = latent_shape(given.frames, given.height, given.width)
            figures |= step(modules["transformer"], given.frames, grid)
    kind = devices[0].device_kind
    print(json.dumps({"devices": f"{count} x {kind}", **figures}))


if __name__ == "__main__":
    COMMAND.run(main)
