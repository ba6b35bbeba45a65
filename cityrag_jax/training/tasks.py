"""CityRAG as a task: velocities of noisy latents, and what the encoders make of clips.

`make_task` chooses between it and the autoencoder's reconstructions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip, Conditions
from cityrag_jax.checkpoint import (
    Bundle,
    Description,
    Modules,
    abstract_model,
    computing_in,
    describe,
    latest_model,
    parameters,
    read_config,
    with_adapters,
    with_parameters,
)
from cityrag_jax.diffusion import flow
from cityrag_jax.encode import encode_conditions, encode_target
from cityrag_jax.model.adapters import add_adapters
from cityrag_jax.model.clip_vision import CLIPVision
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch, copy_from_base
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import WanVAE
from cityrag_jax.parallel import loading_dtype
from cityrag_jax.training.reconstruction import VAEReconstruction, describe_autoencoder
from cityrag_jax.training.task import Examples, Task

MASK_CHANNELS = 4
TRAIN_ONE = (
    "train one with `python -m cityrag_jax.train --config=configs/toy_vae.py "
    "--workdir=DIR` and give --config.model.vae=DIR"
)


def read_start(config: ConfigDict, mesh: Mesh | None = None) -> Bundle | None:
    """Read what a new training starts from, onto the mesh, each network when asked for.

    That is the model of `train.init_from`, if any, with the autoencoder of `model.vae`
    in the place of its own, if that is given.
    """
    kinds = dict(dtype=loading_dtype(), mesh=mesh)
    start = None
    if config.train.init_from:
        start = latest_model(config.train.init_from, **kinds)
    if config.task != "CityRAG" or not config.model.vae:
        return start
    other = latest_model(config.model.vae, **kinds)
    if "vae" not in other.modules:
        raise ValueError(f"There is no autoencoder in {config.model.vae}; {TRAIN_ONE}.")
    start = start or dataclasses.replace(other, modules={}, descriptions={}, text=None)
    return dataclasses.replace(
        start,
        modules=Modules.of(start.modules) | {"vae": other.modules["vae"]},
        descriptions=start.descriptions | {"vae": other.descriptions["vae"]},
    )


def make_task(config: ConfigDict, start: Bundle | None) -> Task:
    """Build the config's task upon what `read_start` gave, or `base/` of a workdir."""
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
        super().__init__(config, start, describe_model(config))
        self.shift = config.train.shift
        self.drop = config.train.drop_probability
        self.mismatch = config.train.mismatch_probability
        self.draws = config.eval.draws
        self.levels = config.eval.noise_levels
        self.eval_seed = config.eval.seed
        self._transformer = read_config(self.description)
        self._abstract = abstract_model(
            as_trained(
                self.description,
                unroll=config.train.unroll_blocks,
                stream_dtype=config.train.stream_dtype,
            )
        )
        vae, vae_description = _find_vae(start, config.model.vae_dtype)
        self._check(vae)
        self._text = _find_text(config.model.text, self._transformer, start)
        self._encoders = {"vae": vae}
        descriptions = {"vae": vae_description, self.part: self.description}
        if self._transformer.image_dim is not None:
            self._encoders["clip"] = _find_clip(self._transformer, start)
            descriptions["clip"] = start.descriptions["clip"]
        self.base = Bundle(self._encoders, descriptions, self._text)
        self._encode = jax.jit(encode_example)

    def _check(self, vae: WanVAE) -> None:
        z, config = vae.config.z_dim, self._transformer
        wanted = z + MASK_CHANNELS + z
        if (config.in_channels, config.out_channels) != (wanted, z):
            raise ValueError(
                f"The transformer has {config.in_channels} channels in and "
                f"{config.out_channels} out; with an autoencoder of {z} channels it "
                f"needs {wanted} (noise, mask, first image) and {z}."
            )

    def _draw_parameters(self, shardings):
        """Leave at zero what a single row of text does not use: it takes no space."""
        fresh = super()._draw_parameters(shardings)
        if self._text.shape[0] > 1:
            return fresh
        unused = ("blocks.cross_attention.q.kernel", "blocks.cross_attention.k.kernel")
        return fresh | {name: jnp.zeros_like(fresh[name]) for name in unused}

    def _adjust(self, given, fresh):
        return add_input_channels(given, fresh)

    def _continue(self, fresh, given):
        """Go on with a whole model, or begin the branches of a base without them."""
        model = with_parameters(self._abstract, fresh | given)
        if not any(name.startswith("branches.") for name in given):
            for branch in model.branches:
                if isinstance(branch, GeoBranch):
                    copy_from_base(branch, model)
        return parameters(model)

    def encode(self, clip: Clip) -> Examples:
        """Encode target, first image and condition video with the frozen encoders."""
        return self._encode(self._encoders, clip, self._text)

    def mix(self, examples, step):
        """Show some clips the retrieved video of the clip before them in the batch."""
        if not self.mismatch:
            return examples
        _, drawn = self._draw(examples["clip_id"], step)
        return swap_conditions(examples, drawn[:, 2] < self.mismatch)

    def loss(self, params, examples, step):
        """Flow-matching loss at one noise level for each clip."""
        key, drawn = self._draw(examples["clip_id"], step)
        keep = (drawn[:, :2] >= self.drop).astype(jnp.float32)
        value, _ = self._flow_loss(params, examples, key, keep[:, 0], keep[:, 1])
        return value, {}

    def _draw(self, clip_id, step):
        """Give the key of noise and levels, and three uniform numbers for each clip."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        flow_key, drop_key = jax.random.split(key)
        drop_keys = flow.clip_keys(drop_key, clip_id)
        return flow_key, jax.vmap(lambda k: jax.random.uniform(k, (3,)))(drop_keys)

    def held_out_losses(self, params, examples):
        """Mean over `eval.draws` fixed draws for each clip, nothing dropped.

        Beside it the loss at each of `eval.noise_levels`. Where it is near 1 at a low
        level, the latents hold as much as that which nothing can predict.
        """
        clip_id = examples["clip_id"]
        keep = jnp.ones(clip_id.shape)
        keys = jax.random.split(jax.random.key(self.eval_seed), self.draws)
        losses = [self._flow_loss(params, examples, key, keep, keep)[1] for key in keys]
        levels = {}
        for level in self.levels:
            _, noise = self._draw_flow(keys[0], examples)
            sigma = jnp.full(clip_id.shape, level, jnp.float32)
            given = (params, examples, sigma, noise, keep, keep)
            levels[f"held_out_at_{level:g}"] = self._velocity_loss(*given)[1]
        return {"held_out": jnp.stack(losses).mean(axis=0)} | levels

    def _flow_loss(self, params, examples, key, keep_pose, keep_geo):
        sigma, noise = self._draw_flow(key, examples)
        given = (params, examples, sigma, noise, keep_pose, keep_geo)
        return self._velocity_loss(*given)

    def _draw_flow(self, key, examples):
        shape = examples["latents"].shape[1:]
        return flow.draw(key, examples["clip_id"], shape, self.shift)

    def _velocity_loss(self, params, examples, sigma, noise, keep_pose, keep_geo):
        model = with_parameters(self._abstract, params)
        latents = examples["latents"]
        noisy = flow.interpolate(latents, noise, sigma)
        conditions = Conditions(
            text=jnp.broadcast_to(self._text[None], (len(latents), *self._text.shape)),
            image=examples.get("image"),
            first_frame=examples["first_frame"],
            geo_latents=examples["geo_latents"],
            geo_length=examples["geo_length"],
            keep_geo=keep_geo,
            poses=examples["poses"],
            keep_pose=keep_pose,
        )
        velocity = model(
            jnp.concatenate([noisy, conditions.first_frame], axis=-1),
            flow.timesteps_of(sigma),
            conditions.text,
            conditions.image,
            model.prepare(conditions),
        )
        return flow.loss(velocity, noise, latents)


def add_input_channels(given: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Let a text-to-video base see mask and first image behind its own channels.

    The new ones start at zero: at first the base makes of its noise what it always did.
    """
    name = "patch_embedding.kernel"  # its rows go channel by channel
    if name not in given:
        return given
    missing = fresh[name].shape[0] - given[name].shape[0]
    if missing <= 0:
        return given
    return given | {name: jnp.pad(given[name], ((0, missing), (0, 0)))}


def swap_conditions(examples: Examples, swapped: Bool[Array, " B"]) -> Examples:
    """Give some clips the retrieved video of the clip before them in the batch."""
    names = ("geo_latents", "geo_length")
    others = {name: jnp.roll(examples[name], 1, axis=0) for name in names}
    return examples | {
        name: jnp.where(
            swapped.reshape(-1, *(1,) * (x.ndim - 1)), others[name], examples[name]
        )
        for name, x in others.items()
    }


def encode_example(
    encoders: dict[str, nnx.Module], clip: Clip, text: Float[Array | np.ndarray, "S E"]
) -> Examples:
    """Encode a batch of clips by the autoencoder and, if there is one, CLIP."""
    conditions = encode_conditions(encoders["vae"], clip, text, encoders.get("clip"))
    example = {
        "latents": encode_target(encoders["vae"], clip),
        "image": conditions.image,
        "first_frame": conditions.first_frame,
        "geo_latents": conditions.geo_latents,
        "geo_length": conditions.geo_length,
        "poses": conditions.poses,
        "clip_id": jnp.asarray(clip.clip_id),
    }
    return {name: x for name, x in example.items() if x is not None}


def _find_vae(start: Bundle | None, dtype: str) -> tuple[WanVAE, Description]:
    if start is None or "vae" not in start.modules:
        where = start.origin if start else "train.init_from (not given)"
        raise ValueError(f"There is no autoencoder in {where}; {TRAIN_ONE}.")
    start = computing_in(start, "vae", dtype)
    return start.modules["vae"], start.descriptions["vae"]


def _find_clip(config: DiTConfig, start: Bundle | None) -> CLIPVision:
    if start is None or "clip" not in start.modules:
        where = start.origin if start else "train.init_from (not given)"
        raise ValueError(
            f"The transformer takes image features of {config.image_dim}, but there is "
            f"no CLIP tower in {where}. Give a model made by tools/convert_wan.py, or "
            "set model.transformer.image_dim to None."
        )
    clip = start.modules["clip"]
    if clip.config.dim != config.image_dim:
        raise ValueError(
            f"model.transformer.image_dim is {config.image_dim}, the CLIP tower in "
            f"{start.origin} gives {clip.config.dim}; make them equal."
        )
    return clip


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
