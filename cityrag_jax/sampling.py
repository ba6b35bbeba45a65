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

CONDITIONS = ("pose", "geo")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How latents are made: solver steps, noise shift and guidance.

    `scales` are those of the guidance mode (`diffusion.guidance`): *assumed*, the paper
    gives none. What `without` names, "pose" or "geo", is never computed: the quickest
    way to leave it out of one video, and another program. To compare ways to fill a
    clip, `drop` conditions instead: one program serves all.
    """

    num_steps: int = 40
    shift: float = 3.0
    guidance: str = "joint"
    scales: tuple[float, ...] = (2.0,)
    without: tuple[str, ...] = ()

    def __post_init__(self):
        _check_names(self.without)

    def passes(self) -> tuple[WeightedPass, ...]:
        """List the weighted passes; what is left out is off in all of them."""
        seen = {name: name not in self.without for name in CONDITIONS}
        return passes(self.guidance, self.scales, **seen)

    def __call__(
        self,
        model: WanDiT,
        conditions: Conditions,
        noise: Float[Array, "B t h w z"],
        *,
        negative_text: Float[Array, "B S E"] | None = None,
    ) -> Float32[Array, "B t h w z"]:
        """Denoise under the conditions.

        Raises ValueError where text guidance lacks the negative prompt's features.
        """
        steps = unipc.make_steps(self.num_steps, self.shift)
        weighted = self.passes()
        if negative_text is None and any(seen.negative_text for _, seen in weighted):
            raise ValueError(
                f"Guidance {self.guidance!r} with scales {self.scales} needs "
                "negative_text, the negative prompt's features; give them or choose "
                "another mode."
            )
        return denoise(model, conditions, noise, steps, weighted, negative_text)


def read_sampler(sample: ConfigDict, without: tuple[str, ...] = ()) -> Sampler:
    """Read a sampler off the sample section of a config."""
    scales = tuple(float(scale) for scale in sample.scales)
    shift = float(sample.shift)
    return Sampler(sample.num_steps, shift, sample.guidance, scales, without)


def drop(conditions: Conditions, *names: str) -> Conditions:
    """Drop "pose" or "geo" from all clips: in the arrays, so nothing compiles anew.

    Equal to a sampler `without` them, whose passes may be fewer.
    """
    _check_names(names)
    kept = {f"keep_{name}": getattr(conditions, f"keep_{name}") for name in names}
    # Times 0 and not new zeros: an array placed elsewhere would be another program.
    return dataclasses.replace(conditions, **{name: 0 * x for name, x in kept.items()})


def draw_noise(
    key: Key[Array, ""],
    clip_id: UInt[Array | np.ndarray, " B"],
    shape: tuple[int, ...],
) -> Float32[Array, "B ..."]:
    """Draw each clip's noise from the seed's key and its id alone."""
    return flow.draw_noise(flow.clip_keys(key, jnp.asarray(clip_id)), shape)


def _check_names(without: tuple[str, ...]) -> None:
    unknown = set(without) - set(CONDITIONS)
    if unknown:
        raise ValueError(
            f"without={','.join(sorted(unknown))}: choose of {CONDITIONS}."
        )


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
