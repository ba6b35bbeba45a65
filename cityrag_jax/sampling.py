"""Noise and Conditions to latents: solver and guidance in one jitted loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt
from ml_collections import ConfigDict

from cityrag_jax.batch import Conditions
from cityrag_jax.diffusion import flow, unipc
from cityrag_jax.diffusion.guidance import Pass, WeightedPass, guide, passes
from cityrag_jax.model.dit import WanDiT


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How latents are made: solver steps, noise shift and guidance.

    `scales` are those of the guidance mode (`diffusion.guidance`): *assumed*, the paper
    gives none.
    """

    num_steps: int = 40
    shift: float = 3.0
    guidance: str = "joint"
    scales: tuple[float, ...] = (2.0,)

    def passes(
        self, *, pose: bool = True, geo: bool = True
    ) -> tuple[WeightedPass, ...]:
        """List the weighted passes; without a condition it is off in all of them."""
        return passes(self.guidance, self.scales, pose=pose, geo=geo)

    def __call__(
        self,
        model: WanDiT,
        conditions: Conditions,
        noise: Float[Array, "B t h w z"],
        *,
        pose: bool = True,
        geo: bool = True,
        negative_text: Float[Array, "B S E"] | None = None,
    ) -> Float32[Array, "B t h w z"]:
        """Denoise under the conditions, or with poses or geo left out altogether.

        Raises ValueError where text guidance lacks the negative prompt's features.
        """
        steps = unipc.make_steps(self.num_steps, self.shift)
        weighted = self.passes(pose=pose, geo=geo)
        if negative_text is None and any(seen.negative_text for _, seen in weighted):
            raise ValueError(
                f"Guidance {self.guidance!r} with scales {self.scales} needs "
                "negative_text, the negative prompt's features; give them or choose "
                "another mode."
            )
        return denoise(model, conditions, noise, steps, weighted, negative_text)


def read_sampler(sample: ConfigDict) -> Sampler:
    """Read a sampler off the sample section of a config."""
    scales = tuple(float(scale) for scale in sample.scales)
    return Sampler(sample.num_steps, float(sample.shift), sample.guidance, scales)


def draw_noise(
    key: Key[Array, ""],
    clip_id: UInt[Array | np.ndarray, " B"],
    shape: tuple[int, ...],
) -> Float32[Array, "B ..."]:
    """Draw each clip's noise from the seed's key and its id alone."""
    return flow.draw_noise(flow.clip_keys(key, jnp.asarray(clip_id)), shape)


@functools.partial(jax.jit, static_argnames="weighted_passes")
def denoise(
    model: WanDiT,
    conditions: Conditions,
    noise: Float[Array, "B t h w z"],
    steps: unipc.Steps,
    weighted_passes: tuple[WeightedPass, ...],
    negative_text: Float[Array, "B S E"] | None = None,
) -> Float32[Array, "B t h w z"]:
    """Run the whole solver; another schedule of as many steps compiles nothing new."""
    prepared = {
        seen: model.prepare(conditions, pose=seen.pose, geo=seen.geo)
        for _, seen in weighted_passes
    }

    def velocity(x: Array, timestep: Array, _, state):
        timesteps = jnp.broadcast_to(timestep, x.shape[:1])
        latents = x
        if conditions.first_frame is not None:
            latents = jnp.concatenate([x, conditions.first_frame], axis=-1)

        def velocity_of(seen: Pass) -> Array:
            text = negative_text if seen.negative_text else conditions.text
            return model(latents, timesteps, text, conditions.image, prepared[seen])

        return guide(velocity_of, weighted_passes), state

    return unipc.solve_with(velocity, noise, steps)[0]
