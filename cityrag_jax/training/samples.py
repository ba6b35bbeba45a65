"""Videos of held-out clips as the model in training makes them, to look at.

Few solver steps: enough to see that it follows the street, not what it could do. The
same clips and the same noise each time, so that one sees what training changes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import abstract_model, with_parameters
from cityrag_jax.data.masks import Shown, cover_views
from cityrag_jax.diffusion import flow
from cityrag_jax.generator import decode
from cityrag_jax.parallel import fetch
from cityrag_jax.sampling import Sampler, read_sampler
from cityrag_jax.training.examples import Sources, plan_held_out
from cityrag_jax.training.program import Program
from cityrag_jax.training.task import Encoders, Examples, Params
from cityrag_jax.training.tasks import conditions_of


def shows_videos(config: ConfigDict) -> bool:
    """Say whether a training shows videos; what it costs is said beside the key."""
    wanted = config.task == "CityRAG" and config.train.tensorboard
    return bool(wanted and config.eval.videos)


def sample_videos(
    config: ConfigDict,
    program: Program,
    params: Params,
    encoders: Encoders,
    examples: Examples,
) -> UInt8[np.ndarray, "n T H W 3"]:
    """Sample the first clips of a batch; beside each is what it should have become.

    On the right the target's own latents, decoded: no model could do better.
    """
    sampler = few_steps(config)
    model = with_parameters(abstract_model(program.task.description), params)
    prepare = functools.partial(_prepare, seed=config.eval.seed)
    conditions, noise = jax.jit(prepare)(examples, encoders["text"])
    made = sampler(model, conditions, noise)
    both = [decode(encoders["vae"], x)[0] for x in (made, examples["latents"])]
    made, true = (x[: config.eval.videos] for x in fetch(both))
    return np.concatenate([made, true], axis=3)


def cover_videos(
    videos: UInt8[np.ndarray, "n T H W 3"], sources: Sources, config: ConfigDict
) -> tuple[UInt8[np.ndarray, "n T H W 3"], Shown]:
    """Mask the people whom the truth shows in both halves of `sample_videos`.

    Clips that are repeated (`train.overfit`) are of the stream: any may show anybody.
    """
    if config.train.overfit:
        bare = [int(np.sum(~city.captures.anonymised)) for city, _ in sources]
        return videos, Shown(sum(bare))
    covered, count = [], Shown()
    for (city, plan), video in zip(
        plan_held_out(sources, config), videos, strict=False
    ):
        halves = np.split(video, 2, axis=2)
        views = city, plan.target_captures, plan.target_yaw_rad
        both = [cover_views(*views, half, config.data.fov_deg) for half in halves]
        covered.append(np.concatenate([half for half, _ in both], axis=2))
        count = count.add(both[0][1])
    return np.stack(covered), count


def few_steps(config: ConfigDict) -> Sampler:
    """Give the config's sampler with few steps; a negative prompt is not at hand."""
    sampler = read_sampler(config.sample)
    if sampler.guidance == "text":
        sampler = dataclasses.replace(sampler, guidance="none", scales=())
    every = dict.fromkeys(("compute", "guided", "teacache"))
    count = config.eval.video_steps
    return dataclasses.replace(sampler, num_steps=count, keep_keys=False, **every)


def _prepare(examples, text, *, seed):
    everything = jnp.ones(len(examples["latents"]))
    conditions = conditions_of(examples, text, everything, everything)
    keys = flow.clip_keys(jax.random.key(seed), examples["clip_id"])
    return conditions, flow.draw_noise(keys, examples["latents"].shape[1:])
