"""Measure a model's residual ratios, of which cache presets make their schedules.

    python tools/calibrate_cache.py --config=configs/toy_city.py \\
        --checkpoint=configs/toy_city_weights --city=DIR [--clips=4]

Held-out clips are sampled with `sample.num_steps` steps, all conditions and no
guidance. Printed: the ratios as a key for generate and evaluate, the steps that each
preset then computes, and those that it computes with Wan 2.1's published ratios.
"""

import argparse

import jax
import numpy as np

from cityrag_jax.commands import Command, find_shipped
from cityrag_jax.data.clips import held_out_clips, stack_clips
from cityrag_jax.diffusion import unipc
from cityrag_jax.diffusion.step_cache import (
    I2V_14B_480P_RATIOS,
    PRESETS,
    magcache_steps,
)
from cityrag_jax.generator import open_generator
from cityrag_jax.parallel import keep_compilations
from cityrag_jax.sampling import draw_noise, residual_ratios
from cityrag_jax.training.examples import clip_config, open_cities

COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--checkpoint", help="model folder or training workdir")
COMMAND.needs("--city", help="city folder")
COMMAND.takes("--clips", type=int, default=4, help="how many held-out clips")


def main(given: argparse.Namespace) -> None:
    """Measure and print."""
    keep_compilations()
    config, sample = given.config, given.config.sample
    ((city, pairs),) = open_cities(str(given.city))
    clips = held_out_clips(
        city,
        pairs,
        clip_config(config.data),
        given.clips,
        seed=config.eval.seed,
        min_rotation_deg=config.eval.min_rotation_deg,
    )
    checkpoint = find_shipped(given.checkpoint)
    generator = open_generator(config, checkpoint, cities=[city])
    transformer = generator.bundle.modules["transformer"]
    steps = unipc.make_steps(sample.num_steps, float(sample.shift))
    measured = []
    for clip in clips:
        batch = stack_clips([clip])
        conditions = generator.encode(batch)
        shape = (*conditions.first_frame.shape[1:4], conditions.geo_latents.shape[-1])
        noise = draw_noise(jax.random.key(config.eval.seed), batch.clip_id, shape)
        measured.append(residual_ratios(transformer, conditions, noise, steps))
    ratios = np.mean(measured, axis=0)
    key = ",".join(f"{ratio:.5f}" for ratio in ratios)
    print(f'--config.sample.ratios="({key})"')
    for name, kind in PRESETS.items():
        if kind is not None:
            own, wan = (
                np.flatnonzero(magcache_steps(kind, some, sample.num_steps)).tolist()
                for some in (ratios.tolist(), I2V_14B_480P_RATIOS)
            )
            print(f"{name}: {len(own)} of {sample.num_steps} steps, {own}")
            print(f"    with Wan 2.1's ratios {len(wan)}, {wan}")


if __name__ == "__main__":
    COMMAND.run(main)
