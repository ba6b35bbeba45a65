"""Measure what the autoencoder's arithmetic costs: bfloat16 beside float32.

    python tools/measure_autoencoder.py --config=configs/toy_city.py \\
        --checkpoint=configs/toy_city_weights --city=DIR [--clips=4] [--rounds=10]

Held-out clips are encoded and decoded in both types. Printed: the relative L2
difference of the latents, seconds a clip, and the PSNR of the video, in dB, against the
truth and against float32's own, when it has gone through the autoencoder once, twice
and so on as 8-bit pixels. A long video goes through once at every join.
"""

import argparse
import time
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, UInt8

from cityrag_jax.checkpoint import Bundle, computing_in, latest_model
from cityrag_jax.commands import Command
from cityrag_jax.data.clips import held_out_clips
from cityrag_jax.encode import to_pixels, to_unit
from cityrag_jax.metrics.image import psnr
from cityrag_jax.model.vae import WanVAE
from cityrag_jax.training.examples import clip_config, open_cities

COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--checkpoint", help="model folder or training workdir")
COMMAND.needs("--city", help="city folder")
COMMAND.takes("--clips", type=int, default=4, help="how many held-out clips")
COMMAND.takes("--rounds", type=int, default=10, help="how often each goes through")

Videos = UInt8[np.ndarray, "B T H W 3"]


def rounds(
    bundle: Bundle, videos: Videos, count: int
) -> Iterator[tuple[Float32[Array, "B t h w z"], Videos]]:
    """Send videos through an autoencoder again and again: latents and pixels."""
    vae = bundle.modules["vae"]

    @nnx.jit
    def encode(vae: WanVAE, video):
        return vae.encode(to_unit(video))

    @nnx.jit
    def decode(vae: WanVAE, latents):
        return to_pixels(vae.decode(latents))

    for _ in range(count):
        latents = [encode(vae, video[None])[0] for video in videos]
        videos = np.stack([np.asarray(decode(vae, x[None])[0]) for x in latents])
        yield np.stack(latents), videos


def main(given: argparse.Namespace) -> None:
    """Measure and print."""
    ((city, pairs),) = open_cities(given.city)
    clips = held_out_clips(city, pairs, clip_config(given.config.data), given.clips)
    truth = np.stack([clip.frames for clip in clips])
    bundle = latest_model(given.checkpoint, dtype="float32")
    made, seconds = {}, {}
    for dtype in ("float32", "bfloat16"):
        began = time.monotonic()
        computing = computing_in(bundle, "vae", dtype)
        made[dtype] = list(rounds(computing, truth, given.rounds))
        seconds[dtype] = (time.monotonic() - began) / given.rounds / given.clips
    (exact, _), (half, _) = (made[dtype][0] for dtype in made)
    difference = np.linalg.norm(half - exact) / np.linalg.norm(exact)
    print(f"{jax.devices()[0].device_kind}, {len(truth)} clips of {truth.shape[1:4]}")
    print(f"latents in bfloat16: relative L2 difference {difference:.4f}")
    print("seconds a clip:", *(f"{name} {s:.2f}" for name, s in seconds.items()))
    print(
        "| round | float32 | bfloat16 | bfloat16 against float32 |\n|---|---|---|---|"
    )
    for i, ((_, exact), (_, half)) in enumerate(zip(*made.values(), strict=True)):
        figures = psnr(exact, truth), psnr(half, truth), psnr(half, exact)
        print(f"| {i + 1} |", *(f"{np.mean(x):.2f} |" for x in figures))


if __name__ == "__main__":
    COMMAND.run(main)
