"""Store a model folder with int8 kernels, or say what a block of the 14B loses so.

    python tools/store_int8.py --checkpoint=DIR --out=DIR
    python tools/store_int8.py --random-14b [--dim=5120]

DIR is a model folder or a training workdir, whose newest model is read whole;
published weights are better converted with `tools/convert_wan.py --dtype=int8`, which
needs little memory. The first form writes the folder and prints bytes, the relative L2
error of the transformer's velocity and the PSNR of decoded latents, both on random
inputs and in float32. The second draws one block of I2V-14B with both branches,
embeddings and head, all kernels normal, and prints the velocity's error as int8 and,
beside it, as bfloat16: 2 GB of disk, 6.2 GiB of memory.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from time_checkpoint import random_conditions

from cityrag_jax.checkpoint import (
    Bundle,
    abstract_model,
    describe,
    hush_writers,
    latest_model,
    load_bundle,
    parameters,
    save_bundle,
    with_parameters,
)
from cityrag_jax.commands import Command
from cityrag_jax.metrics.image import clip_psnr
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import WanVAE

TIMESTEPS = (900.0, 500.0, 100.0)
GRID = (3, 8, 8)  # latent frames, rows, columns
FRAMES, SPEED_M = 9, 0.4  # of video, and what the camera drives between two of them


def velocities(model: WanDiT, seed: int = 0) -> dict[float, Float[Array, "1 t h w O"]]:
    """Predict random latents' velocities under all conditions, by timestep."""
    keys = jax.random.split(jax.random.key(seed))
    conditions = random_conditions(model, FRAMES, GRID, keys[0])
    drive = jnp.eye(4) + jnp.zeros((1, FRAMES, 1, 1))
    drive = drive.at[:, :, 2, 3].set(SPEED_M * jnp.arange(FRAMES)[None])
    conditions = dataclasses.replace(conditions, poses=drive)
    latents = jax.random.normal(keys[1], (1, *GRID, model.config.out_channels))
    if conditions.first_frame is not None:
        latents = jnp.concatenate([latents, conditions.first_frame], axis=-1)

    @jax.jit
    def predict(model, timesteps):
        prepared = model.prepare(conditions)
        text, image = conditions.text, conditions.image
        return model(latents, timesteps, text, image, prepared)

    return {t: predict(model, jnp.full(1, t)) for t in TIMESTEPS}


def velocity_errors(stored: dict, true: dict) -> dict[str, float]:
    """Give |stored - true| / |true| for each timestep."""
    return {
        f"{t:.0f}": float(jnp.linalg.norm(stored[t] - v) / jnp.linalg.norm(v))
        for t, v in true.items()
    }


def decoded_psnr(stored: WanVAE, true: WanVAE, seed: int = 0) -> float:
    """Compare the videos of the same random latents, in decibels."""
    latents = jax.random.normal(jax.random.key(seed), (1, *GRID, true.config.z_dim))
    decode = jax.jit(lambda vae: jnp.clip(vae.decode(latents), -1, 1) / 2 + 0.5)
    videos = [np.asarray(decode(vae), np.float64)[0] for vae in (stored, true)]
    return clip_psnr(*videos)


def folder_bytes(folder: Path) -> int:
    """Add up the files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def store(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write the newest model of `checkpoint` as int8 and measure what was lost."""
    true = latest_model(checkpoint, dtype=jnp.float32)
    save_bundle(out, true, dtype="int8")
    stored = load_bundle(out, dtype=jnp.float32, verify=True)
    figures: dict[str, Any] = {"bytes": folder_bytes(out)}
    for name in stored.modules:
        pair = stored.modules[name], true.modules[name]
        if isinstance(pair[0], WanDiT):
            figures["velocity_error"] = velocity_errors(*map(velocities, pair))
        if isinstance(pair[0], WanVAE):
            figures["decoded_psnr"] = decoded_psnr(*pair)
    return figures


def measure_random_14b(**changes: int) -> dict[str, Any]:
    """Store a random block of I2V-14B as int8 and bfloat16 and compare velocities."""
    kinds = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    config = DiTConfig.i2v_14b(num_layers=1, **changes, **kinds)
    branches = ((TrajectoryEncoder, {}), (GeoBranch, {}))
    descriptions = {"transformer": describe(WanDiT, config, branches)}
    model = draw_normal(abstract_model(descriptions["transformer"]))
    true = velocities(model)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        kept = {dtype: Path(temporary) / dtype for dtype in ("int8", "bfloat16")}
        for dtype, folder in kept.items():
            bundle = Bundle({"transformer": model}, descriptions)
            save_bundle(folder, bundle, dtype=dtype)
        del model, bundle  # before the next one comes
        for dtype, folder in kept.items():
            stored = velocities(load_bundle(folder).modules["transformer"])
            size, errors = folder_bytes(folder), velocity_errors(stored, true)
            figures[dtype] = {"bytes": size, "velocity_error": errors}
    return figures


def draw_normal(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Draw every parameter: kernels that keep the size of what they are given."""
    values = {}
    for index, (name, x) in enumerate(parameters(model).items()):
        key = jax.random.fold_in(jax.random.key(seed), index)
        inputs = x.shape[-2] if name.endswith("kernel") else model.config.dim
        mean = 1.0 if name.endswith("scale") else 0.0
        values[name] = mean + inputs**-0.5 * jax.random.normal(key, x.shape, x.dtype)
    return with_parameters(model, values)


COMMAND = Command(__doc__)
COMMAND.takes("--checkpoint", type=Path, help="model folder or training workdir")
COMMAND.makes("--out", needed=False, type=Path, help="folder to make")
COMMAND.switch("--random-14b", "only measure, a random block")
COMMAND.takes("--dim", type=int, default=5120, help="of the random block")


def main(given: argparse.Namespace) -> None:
    """Store or measure, and print one line of JSON."""
    hush_writers()
    if given.random_14b:
        changes = dict(dim=given.dim, num_heads=given.dim // 128)
        figures = measure_random_14b(**changes)
    elif given.checkpoint and given.out:
        figures = store(given.checkpoint, given.out)
    else:
        raise ValueError("Give --checkpoint and --out, or --random-14b.")
    print(json.dumps(figures))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    COMMAND.run(main)
