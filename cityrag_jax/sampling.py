"""Noise and Conditions to latents: solver and guidance in one jitted loop."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key, UInt
from ml_collections import ConfigDict

from cityrag_jax.batch import Conditions, token_grid
from cityrag_jax.diffusion import flow, unipc
from cityrag_jax.diffusion.guidance import Pass, WeightedPass, guide, passes
from cityrag_jax.diffusion.step_cache import (
    I2V_14B_480P_RATIOS,
    PRESETS,
    TEACACHE,
    TeaCache,
    magcache_steps,
    teacache_steps,
)
from cityrag_jax.model.dit import Stream, WanDiT
from cityrag_jax.parallel import fetch, shard

CONDITIONS = ("pose", "geo")
TEACACHE_PRESET = "teacache"

Velocities = Callable[[], Iterable[Float[Array, "B t h w z"]]]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How latents are made: solver steps, noise shift and guidance.

    `scales` are those of the guidance mode (`diffusion.guidance`): *assumed*, the paper
    gives none. What `without` names, "pose" or "geo", is never computed: the quickest
    way to leave it out of one video, and another program. To compare ways to fill a
    clip, `drop` conditions instead: one program serves all.

    `keep_keys` makes the keys and values of geo, text and image once a clip, for all
    blocks: nothing else changes. At full size it saves 0.12 of 2.42 PFLOP a forward for
    26.8 GB (81 frames of condition), split over the devices of a clip.

    `compute` says of every step whether the blocks are run, or their last residual is
    added again (`diffusion.step_cache`); None runs them always, and exactly. With
    `teacache`, a way and a threshold, the model's own time embeddings say it. `guided`
    says in which steps there is guidance; the others cost one pass. None is all.
    """

    num_steps: int = 40
    shift: float = 3.0
    guidance: str = "joint"
    scales: tuple[float, ...] = (2.0,)
    without: tuple[str, ...] = ()
    keep_keys: bool = False
    compute: tuple[bool, ...] | None = None
    guided: tuple[bool, ...] | None = None
    teacache: tuple[TeaCache, float] | None = None

    def __post_init__(self):
        _check_names(self.without)
        for what, told in (("computed", self.compute), ("guided", self.guided)):
            if told is not None and len(told) != self.num_steps:
                raise ValueError(
                    f"{len(told)} steps are said to be {what} or not, of "
                    f"{self.num_steps}; make the schedule for that many."
                )

    def passes(self) -> tuple[WeightedPass, ...]:
        """List the weighted passes; what is left out is off in all of them."""
        return passes(self.guidance, self.scales, self.without)

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
        weights, seen = zip(*weighted, strict=True)
        compute = self.computed(model)
        return denoise(
            model,
            conditions,
            noise,
            steps,
            np.asarray(weights, np.float32),
            negative_text,
            None if compute is None else np.asarray(compute),
            None if self.guided is None or len(seen) == 1 else np.asarray(self.guided),
            seen=seen,
            keep_keys=self.keep_keys,
        )

    def computed(self, model: WanDiT) -> tuple[bool, ...] | None:
        """Say which steps are computed: for TeaCache by the model's weights."""
        if self.teacache is None:
            return self.compute
        kind, threshold = self.teacache
        timesteps = unipc.make_steps(self.num_steps, self.shift).timestep
        seen = _embed_times(model, jnp.asarray(timesteps), kind.projected)
        steps = teacache_steps(kind, np.asarray(fetch(seen)), threshold)
        return _also_where_guidance_ends(tuple(steps.tolist()), self.guided)


@functools.partial(jax.jit, static_argnums=2)
def _embed_times(model: WanDiT, timesteps: Float[Array, " n"], projected: bool):
    embedding, six = model.embed_time(timesteps)
    return six.reshape(len(six), -1) if projected else embedding


def read_sampler(sample: ConfigDict, without: tuple[str, ...] = ()) -> Sampler:
    """Read a sampler off the sample section of a config."""
    scales = tuple(float(scale) for scale in sample.scales)
    shift = float(sample.shift)
    kinds = dict(without=without, keep_keys=sample.keep_keys)
    guided = read_guided(sample)
    compute = _also_where_guidance_ends(read_schedule(sample), guided)
    kinds |= {"compute": compute, "guided": guided, "teacache": read_teacache(sample)}
    return Sampler(sample.num_steps, shift, sample.guidance, scales, **kinds)


def _also_where_guidance_ends(compute, guided):
    """Compute too where guidance returns: its passes have nothing to repeat there."""
    if not compute or not guided:
        return compute
    before = (True, *guided[:-1])
    each = zip(compute, guided, before, strict=True)
    return tuple(runs or (now and not last) for runs, now, last in each)


def read_teacache(sample: ConfigDict) -> tuple[TeaCache, float] | None:
    """Give TeaCache's way and threshold, if the preset of a config is that."""
    if sample.preset != TEACACHE_PRESET:
        return None
    name, projected, threshold = sample.teacache
    if (name, projected) not in TEACACHE or not threshold > 0:
        names = ", ".join(dict.fromkeys(name for name, _ in TEACACHE))
        raise ValueError(
            f"sample.teacache is {tuple(sample.teacache)}; give the model whose "
            f"coefficients to take ({names}), whether to look at projected embeddings "
            "(True or False) and a threshold above 0, such as 0.26."
        )
    return TEACACHE[name, projected], float(threshold)


def read_schedule(sample: ConfigDict) -> tuple[bool, ...] | None:
    """Give the computed steps of the preset in a config; None for all of them.

    None, too, where the model's weights will say.
    """
    if sample.preset == TEACACHE_PRESET:
        return None
    if sample.preset not in PRESETS:
        raise ValueError(
            f"sample.preset is {sample.preset!r}; choose of {', '.join(PRESETS)}, "
            f"{TEACACHE_PRESET}."
        )
    kind = PRESETS[sample.preset]
    if kind is None:
        return None
    ratios = tuple(map(float, sample.ratios)) or I2V_14B_480P_RATIOS
    return tuple(magcache_steps(kind, ratios, sample.num_steps).tolist())


def read_guided(sample: ConfigDict) -> tuple[bool, ...] | None:
    """Give the guided steps of a config, a stretch of them; None for all."""
    first, last = map(float, sample.guided)
    if not 0 <= first < last <= 1:
        raise ValueError(
            f"sample.guided is {sample.guided}; give the shares of the steps at which "
            "guidance begins and ends, such as (0.0, 0.6)."
        )
    edges = round(first * sample.num_steps), round(last * sample.num_steps)
    guided = tuple(edges[0] <= step < edges[1] for step in range(sample.num_steps))
    return None if all(guided) else guided


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


@functools.partial(jax.jit, static_argnames=("seen", "keep_keys"))
def denoise(
    model: WanDiT,
    conditions: Conditions,
    noise: Float[Array, "B t h w z"],
    steps: unipc.Steps,
    weights: Float[Array, " passes"],
    negative_text: Float[Array, "B S E"] | None = None,
    compute: Bool[Array, " n"] | None = None,
    guided: Bool[Array, " n"] | None = None,
    *,
    seen: tuple[Pass, ...],
    keep_keys: bool = False,
) -> Float32[Array, "B t h w z"]:
    """Run the whole solver with the passes `seen`.

    Other weights, or another schedule of as many steps, compile nothing new. `compute`
    says in which steps the blocks are run; each pass keeps its own residual. In steps
    that are not `guided` the first pass is the velocity, and alone is run.
    """
    contexts, prepared = {}, {}
    for each in seen:
        text = negative_text if each.negative_text else conditions.text
        contexts[each.negative_text] = model.prepare_context(
            text, conditions.image, keep_keys=keep_keys
        )
        prepared[each.without] = model.prepare(
            conditions, without=each.without, keep_keys=keep_keys
        )

    start = functools.partial(_start, model, conditions)

    def run(stream: Stream, each: Pass) -> Array:
        given = contexts[each.negative_text], prepared[each.without]
        return model.run(stream, *given)

    def choose(
        guides: Array | None, first: Array, others: Callable[[], Iterable[Array]]
    ):
        """Guide by the other velocities, made for it, or take the first as it is."""
        if guides is None:
            return guide([first, *others()], weights)
        return jax.lax.cond(
            guides,
            lambda: guide([first, *others()], weights),
            lambda: first.astype(jnp.float32),
        )

    def velocity(x: Array, timestep: Array, now: tuple, residuals):
        stream, (computed, guides) = start(x, timestep), now

        def made(each: Pass) -> Array:
            return model.finish(stream, run(stream, each))

        if computed is None:
            others = functools.partial(map, made, seen[1:])
            return choose(guides, made(seen[0]), others), residuals
        also = computed if guides is None else computed & guides
        residuals = tuple(
            jax.lax.cond(
                wanted,
                lambda each=each: run(stream, each) - stream.x,
                lambda last=last: last,
            )
            for wanted, each, last in zip(
                (computed, *(also,) * (len(seen) - 1)), seen, residuals, strict=True
            )
        )
        first, *rest = (model.finish(stream, stream.x + r) for r in residuals)
        return choose(guides, first, lambda: rest), residuals

    residuals = None
    if compute is not None:
        x = jax.eval_shape(lambda x, t: start(x, t).x, noise, steps.timestep[0])
        empty = shard(jnp.zeros(x.shape, x.dtype), "batch", "tokens", None)
        residuals = (empty,) * len(seen)
    now = (compute, guided)
    return unipc.solve_with(velocity, noise, steps, now, residuals)[0]


def _start(model: WanDiT, conditions: Conditions, x: Array, timestep: Array) -> Stream:
    """Put the first image's channels behind the noise, and embed."""
    latents = x
    if conditions.first_frame is not None:
        latents = jnp.concatenate([x, conditions.first_frame], axis=-1)
    return model.start(latents, jnp.broadcast_to(timestep, x.shape[:1]))


@jax.jit
def residual_ratios(
    model: WanDiT,
    conditions: Conditions,
    noise: Float[Array, "B t h w z"],
    steps: unipc.Steps,
) -> Float32[Array, " n"]:
    """Measure how much longer the blocks' residuals are than a step before.

    Mean over tokens and clips, with all conditions and no guidance; 1 for the first
    step. `diffusion.step_cache` makes schedules of it.
    """
    context = model.prepare_context(conditions.text, conditions.image)
    prepared = model.prepare(conditions)

    def velocity(x: Array, timestep: Array, step: Array, last):
        before, ratios = last
        stream = _start(model, conditions, x, timestep)
        made = model.run(stream, context, prepared)
        residual = (made - stream.x).astype(jnp.float32)
        length = jnp.linalg.norm(residual[:, : tokens[1]], axis=-1)
        ratio = jnp.where(step == 0, 1, jnp.mean(length / before))
        return model.finish(stream, made), (length, ratios.at[step].set(ratio))

    num_steps, (_, *grid) = len(steps.timestep), noise.shape[:4]
    tokens = len(noise), int(np.prod(token_grid(tuple(grid), model.config.patch)))
    start = jnp.ones(tokens), jnp.zeros(num_steps)
    order = jnp.arange(num_steps)
    return unipc.solve_with(velocity, noise, steps, order, start)[1][1]
