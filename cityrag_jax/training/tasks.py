"""CityRAG as a task: velocities of noisy latents, and what the encoders make of clips.

`make_task` chooses between it and the autoencoder's reconstructions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip, Conditions
from cityrag_jax.checkpoint import (
    Arrays,
    Bundle,
    Description,
    abstract_model,
    describe,
    parameters,
    read_config,
    with_adapters,
    with_parameters,
)
from cityrag_jax.diffusion import flow
from cityrag_jax.encode import encode_clips
from cityrag_jax.model.adapters import add_adapters
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch, copy_from_base
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.training.reconstruction import VAEReconstruction, describe_autoencoder
from cityrag_jax.training.task import DRAWN_LEVEL, Examples, Probe, Task

MASK_CHANNELS = 4
# What a clip is shown of the place, before and behind the encoders.
RETRIEVED = (
    *("condition", "condition_length", "first_from_view"),
    *("geo_latents", "geo_length", "geo_poses"),
)
TRAIN_ONE = (
    "train one with `python -m cityrag_jax.train --config=configs/toy_vae.py "
    "--workdir=DIR` and give --config.model.vae=DIR"
)


def make_task(config: ConfigDict, start: Bundle | None) -> Task:
    """Build the config's task upon what a start's descriptions and prompt say."""
    tasks = {"CityRAG": CityRAG, "VAEReconstruction": VAEReconstruction}
    if config.task not in tasks:
        raise ValueError(f"config.task is {config.task!r}; choose of {sorted(tasks)}.")
    return tasks[config.task](config, start)


def describe_model(config: ConfigDict) -> Description:
    """Describe the module that a config trains, without building it."""
    model = config.model
    if config.task == "VAEReconstruction":
        return describe_autoencoder(config)
    sizes = dict(model.transformer)
    if model.preset:
        transformer = getattr(DiTConfig, model.preset)(**sizes)
    else:
        transformer = DiTConfig(**sizes)
    branches = (
        (TrajectoryEncoder, dict(model.pose)),
        (GeoBranch, dict(model.geo)),
    )
    description = describe(WanDiT, transformer, branches)
    if not model.adapters.linears:
        return description
    adapters = dict(model.adapters) | {"linears": list(model.adapters.linears)}
    return with_adapters(description, add_adapters, **adapters)


def as_trained(description: Description, **changes: Any) -> Description:
    """Describe the same transformer, computed in another way while it is trained."""
    return description | {"config": description["config"] | changes}


class CityRAG(Task):
    """Velocities of noisy latents under the first image, poses and retrieved video.

    Rectified flow with shifted noise levels; pose and geo condition are each dropped
    with `drop_probability`, independently (section 3.3). With `mismatch_probability` a
    clip is shown another clip's retrieved video, so that one which does not fit the
    first image is ignored, not copied (figure 7; how is *assumed*).
    """

    part = "transformer"

    def __init__(self, config: ConfigDict, start: Bundle | None):
        description = describe_model(config)
        transformer = read_config(description)
        encoders = {"vae": _find_vae(transformer, start)}
        if transformer.image_dim is not None:
            encoders["clip"] = _find_clip(transformer, start)
        text = _find_text(config.model.text, transformer, start)
        super().__init__(config, description, encoders, text)
        self.shift = config.train.shift
        self.drop = config.train.drop_probability
        self.mismatch = config.train.mismatch_probability
        self.draws = config.eval.draws
        self.levels = config.eval.noise_levels
        self.eval_seed = config.eval.seed
        self._abstract = abstract_model(
            as_trained(
                description,
                unroll=config.train.unroll_blocks,
                stream_dtype=config.train.stream_dtype,
            )
        )

    def _draw_parameters(self, shardings):
        """Leave at zero what a single row of text does not use: it takes no space."""
        fresh = super()._draw_parameters(shardings)
        if self.text.shape[0] > 1:
            return fresh
        unused = ("blocks.cross_attention.q.kernel", "blocks.cross_attention.k.kernel")
        return fresh | {n: jnp.zeros_like(fresh[n]) for n in unused if n in fresh}

    def _adjust(self, given, shapes):
        return add_input_channels(given, shapes)

    def _continue(self, fresh, given):
        """Go on with a whole model, or begin the branches of a base without them."""
        model = with_parameters(self._abstract, fresh | given)
        if not any(name.startswith("branches.") for name in given):
            for branch in model.branches:
                if isinstance(branch, GeoBranch):
                    copy_from_base(branch, model)
        return parameters(model)

    def encode(self, encoders, clip):
        """Encode target, first image and condition video with the frozen encoders."""
        vae, text = encoders["vae"], encoders["text"]
        latents, conditions = encode_clips(vae, clip, text, encoders.get("clip"))
        example = {
            "latents": latents,
            "image": conditions.image,
            "first_frame": conditions.first_frame,
            "geo_latents": conditions.geo_latents,
            "geo_length": conditions.geo_length,
            "geo_poses": conditions.geo_poses,
            "poses": conditions.poses,
            "clip_id": jnp.asarray(clip.clip_id),
        }
        return {name: x for name, x in example.items() if x is not None}

    def mix(self, batch, step):
        """Show some clips the retrieved video of the clip before them in the batch."""
        if not self.mismatch:
            return batch
        clip_id = batch.clip_id if isinstance(batch, Clip) else batch["clip_id"]
        _, drawn = self._draw(clip_id, step)
        return swap_conditions(batch, drawn[:, 2] < self.mismatch)

    def loss(self, params, encoders, examples, step):
        """Flow-matching loss at one noise level for each clip."""
        key, drawn = self._draw(examples["clip_id"], step)
        sigma, noise = self._draw_flow(key, examples)
        keep = (drawn[:, :2] >= self.drop).astype(jnp.float32)
        given = (params, encoders, examples, sigma, noise, keep[:, 0], keep[:, 1])
        return self._velocity_loss(*given)[0], {}

    def _draw(self, clip_id, step):
        """Give the key of noise and levels, and three uniform numbers for each clip."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        flow_key, drop_key = jax.random.split(key)
        drop_keys = flow.clip_keys(drop_key, clip_id)
        return flow_key, jax.vmap(lambda k: jax.random.uniform(k, (3,)))(drop_keys)

    @property
    def probes(self):
        """Fixed draws for each clip, and one draw at each of `eval.noise_levels`.

        Where the loss is near 1 at a low level, the latents hold as much as that which
        nothing can predict.
        """
        draws = [Probe(np.int32(draw), DRAWN_LEVEL) for draw in range(self.draws)]
        levels = {
            f"held_out_at_{level:g}": [Probe(np.int32(0), np.float32(level))]
            for level in self.levels
        }
        return {"held_out": draws} | levels

    def held_out_loss(self, params, encoders, examples, probe):
        """Measure velocities at a probe's noise and level, nothing dropped."""
        keys = jax.random.split(jax.random.key(self.eval_seed), self.draws)
        sigma, noise = self._draw_flow(keys[probe.draw], examples)
        sigma = jnp.where(probe.level == DRAWN_LEVEL, sigma, probe.level)
        keep = jnp.ones(sigma.shape)
        given = (params, encoders, examples, sigma, noise, keep, keep)
        return self._velocity_loss(*given)[1]

    def _draw_flow(self, key, examples):
        shape = examples["latents"].shape[1:]
        return flow.draw(key, examples["clip_id"], shape, self.shift)

    def _velocity_loss(
        self, params, encoders, examples, sigma, noise, keep_pose, keep_geo
    ):
        model = with_parameters(self._abstract, params)
        latents = examples["latents"]
        noisy = flow.interpolate(latents, noise, sigma)
        conditions = conditions_of(examples, encoders["text"], keep_pose, keep_geo)
        velocity = model(
            jnp.concatenate([noisy, conditions.first_frame], axis=-1),
            flow.timesteps_of(sigma),
            conditions.text,
            conditions.image,
            model.prepare(conditions),
        )
        return flow.loss(velocity, noise, latents)


def conditions_of(
    examples: Examples,
    text: Float[Array, "S E"],
    keep_pose: Float[Array, " B"],
    keep_geo: Float[Array, " B"],
) -> Conditions:
    """Put together what the transformer is told of examples."""
    return Conditions(
        text=jnp.broadcast_to(text[None], (len(keep_geo), *text.shape)),
        image=examples.get("image"),
        first_frame=examples["first_frame"],
        geo_latents=examples["geo_latents"],
        geo_length=examples["geo_length"],
        keep_geo=keep_geo,
        poses=examples["poses"],
        keep_pose=keep_pose,
        geo_poses=examples.get("geo_poses"),
    )


def add_input_channels(given: Arrays, shapes: Arrays) -> Arrays:
    """Let a text-to-video base see mask and first image behind its own channels.

    The new ones start at zero: at first the base makes of its noise what it always did.
    """
    name = "patch_embedding.kernel"  # its rows go channel by channel
    if name not in given:
        return given
    missing = shapes[name].shape[0] - given[name].shape[0]
    if missing <= 0:
        return given
    return given | {name: jnp.pad(given[name], ((0, missing), (0, 0)))}


def swap_conditions(
    batch: Clip | Examples, swapped: Bool[Array, " B"]
) -> Clip | Examples:
    """Give some clips the retrieved video of the clip before them in the batch."""

    def swap(path, x):
        if jax.tree_util.keystr(path, simple=True) not in RETRIEVED:
            return x
        chosen = swapped.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(chosen, jnp.roll(x, 1, axis=0), x)

    return jax.tree_util.tree_map_with_path(swap, batch)


def _find_vae(config: DiTConfig, start: Bundle | None) -> Description:
    if start is None or "vae" not in start.descriptions:
        where = start.origin if start else "train.init_from (not given)"
        raise ValueError(f"There is no autoencoder in {where}; {TRAIN_ONE}.")
    z = read_config(start.descriptions["vae"]).z_dim
    wanted = z + MASK_CHANNELS + z
    if (config.in_channels, config.out_channels) != (wanted, z):
        raise ValueError(
            f"The transformer has {config.in_channels} channels in and "
            f"{config.out_channels} out; with an autoencoder of {z} channels it "
            f"needs {wanted} (noise, mask, first image) and {z}."
        )
    return start.descriptions["vae"]


def _find_clip(config: DiTConfig, start: Bundle | None) -> Description:
    if start is None or "clip" not in start.descriptions:
        where = start.origin if start else "train.init_from (not given)"
        raise ValueError(
            f"The transformer takes image features of {config.image_dim}, but there is "
            f"no CLIP tower in {where}. Give a model made by tools/convert_wan.py, or "
            "set model.transformer.image_dim to None."
        )
    width = read_config(start.descriptions["clip"]).dim
    if width != config.image_dim:
        raise ValueError(
            f"model.transformer.image_dim is {config.image_dim}, the CLIP tower in "
            f"{start.origin} gives {width}; make them equal."
        )
    return start.descriptions["clip"]


def _find_text(kind: str, config: DiTConfig, start: Bundle | None) -> np.ndarray:
    """Give the fixed prompt's rows [S, E]: a constant, or those of the start model."""
    if start is not None and start.text is not None:
        return start.text
    if kind != "constant":
        raise ValueError(
            f"config.model.text is {kind!r}, but the start model stores no prompt; "
            "encode it with tools/encode_prompt.py, or choose 'constant'."
        )
    shape = (config.text_len, config.text_dim)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
