"""The sampler against a slow loop, and what it must not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cityrag_jax.batch import Conditions
from cityrag_jax.checkpoint import (
    abstract_model,
    describe,
    parameters,
    with_parameters,
)
from cityrag_jax.diffusion import unipc
from cityrag_jax.diffusion.step_cache import TEACACHE, TeaCache
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.sampling import (
    Sampler,
    denoise,
    draw_noise,
    drop,
    read_sampler,
    residual_ratios,
)

TINY = DiTConfig(
    dim=32,
    num_heads=2,
    num_layers=2,
    ffn_dim=48,
    in_channels=36,
    freq_dim=32,
    text_dim=8,
    text_len=1,
)
BATCH, FRAMES, SHAPE = 2, 9, (3, 4, 6, 16)  # latents t, h, w, z of 9 frames
STEPS = 3
JOINT = Sampler(STEPS, guidance="joint", scales=(2.5,))


def model_of_no_zeros() -> WanDiT:
    """Make a model in which every condition changes the velocity."""
    branches = ((TrajectoryEncoder, dict(hidden=16)), (GeoBranch, {}))
    empty = abstract_model(describe(WanDiT, TINY, branches))
    rng = np.random.default_rng(0)
    values = {
        name: rng.normal(0, 0.2, x.shape).astype(np.float32)
        for name, x in parameters(empty).items()
    }
    return with_parameters(empty, jax.tree.map(jnp.asarray, values))


@pytest.fixture(scope="module")
def model() -> WanDiT:
    return model_of_no_zeros()


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    keys = jax.random.split(jax.random.key(1), 3)
    return Conditions(
        text=jnp.ones((BATCH, 1, 8)),
        first_frame=jax.random.normal(keys[0], (BATCH, *SHAPE[:3], 20)),
        geo_latents=jax.random.normal(keys[1], (BATCH, 4, *SHAPE[1:])),
        geo_length=jnp.array([4, 2]),
        keep_geo=jnp.ones(BATCH),
        poses=jax.random.normal(keys[2], (BATCH, FRAMES, 4, 4)),
        keep_pose=jnp.ones(BATCH),
    )


@pytest.fixture(scope="module")
def noise():
    return draw_noise(jax.random.key(2), np.array([7, 8], np.uint32), SHAPE)


@jax.jit
def both_velocities(model, conditions, x, timestep, residuals=None):
    """Give v(pose, geo) and v(neither) at a state, and what the blocks added."""
    latents = jnp.concatenate([x, conditions.first_frame], axis=-1)
    times = jnp.full(len(x), timestep)
    stream = model.start(latents, times)
    context = model.prepare_context(conditions.text)
    last = []
    for without in ((), ("pose", "geo")):
        prepared = model.prepare(conditions, without=without)
        last.append(model.run(stream, context, prepared) - stream.x)
    residuals = last if residuals is None else residuals
    return [model.finish(stream, stream.x + r) for r in residuals], residuals


def slow_loop(
    model, conditions, noise, scale: float, repeated=(), unguided=()
) -> np.ndarray:
    """The equations at the top of diffusion/unipc.py, step by step in float64.

    The steps `repeated` add what the blocks added the step before; those `unguided`
    take the velocity with all conditions.
    """
    residuals = None
    steps = unipc.make_steps(STEPS, 3.0)
    x = corrected = np.asarray(noise, np.float64)
    before = last = np.zeros_like(x)
    for i in range(STEPS):
        now = model, conditions, x.astype(np.float32), steps.timestep[i]
        again = residuals if i in repeated else None
        (full, neither), residuals = both_velocities(*now, again)
        full, neither = np.asarray(full, np.float64), np.asarray(neither, np.float64)
        guidance = 1.0 if i in unguided else scale
        velocity = neither + guidance * (full - neither)
        data = x - steps.sigma[i] * velocity
        a, b = steps.corrector[i], steps.predictor[i]
        corrected = a[0] * corrected + a[1] * before + a[2] * last + a[3] * data
        x = b[0] * corrected + b[1] * last + b[2] * data
        before, last = last, data
    return x


def test_sampler_equals_a_slow_loop(model, conditions, noise):
    """Tolerance 1e-5 relative L2: float32 states of three steps; 3e-7 is reached."""
    made = JOINT(model, conditions, noise)
    expected = slow_loop(model, conditions, noise, 2.5)
    error = np.linalg.norm(made - expected) / np.linalg.norm(expected)
    assert error < 1e-5
    # Without guidance the answer is another one: the loop above does test the scale.
    unguided = slow_loop(model, conditions, noise, 1.0)
    assert np.linalg.norm(made - unguided) > 0.01 * np.linalg.norm(expected)


def test_equal_noise_gives_equal_latents_and_other_noise_others(
    model, conditions, noise
):
    made = JOINT(model, conditions, noise)
    np.testing.assert_array_equal(made, JOINT(model, conditions, noise))
    ids = jnp.array([7, 8], jnp.uint32)
    other = draw_noise(jax.random.key(3), ids, SHAPE)
    assert np.abs(made - JOINT(model, conditions, other)).max() > 0.1


def test_another_schedule_of_as_many_steps_compiles_nothing_new(
    model, conditions, noise
):
    made = JOINT(model, conditions, noise)
    compiled = denoise._cache_size()
    shifted = Sampler(STEPS, shift=5.0, guidance="joint", scales=(2.5,))
    assert np.abs(made - shifted(model, conditions, noise)).max() > 1e-3
    assert denoise._cache_size() == compiled


def test_joint_guidance_of_scale_1_is_no_guidance(model, conditions, noise):
    """And costs as much: one pass, the same program."""
    plain = Sampler(STEPS, guidance="none", scales=())
    made = plain(model, conditions, noise)
    compiled = denoise._cache_size()
    joint = Sampler(STEPS, guidance="joint", scales=(1.0,))
    np.testing.assert_array_equal(made, joint(model, conditions, noise))
    assert denoise._cache_size() == compiled


def test_other_scales_compile_nothing_new(model, conditions, noise):
    made = JOINT(model, conditions, noise)
    compiled = denoise._cache_size()
    stronger = dataclasses.replace(JOINT, scales=(3.5,))
    assert np.abs(made - stronger(model, conditions, noise)).max() > 1e-3
    assert denoise._cache_size() == compiled


def test_keys_that_are_kept_change_nothing(model, conditions, noise):
    """They do not see the timestep: made once a clip they are those of every step.

    Tolerance 1e-6 of latents of about 1: fused with other things, products may round
    apart.
    """
    keeping = dataclasses.replace(JOINT, keep_keys=True)
    made, kept = (each(model, conditions, noise) for each in (JOINT, keeping))
    scale = np.abs(made).max()
    np.testing.assert_allclose(kept, made, rtol=0, atol=1e-6 * scale)


def test_repeated_steps_add_the_last_residual_again(model, conditions, noise):
    """Each pass its own, against a slow loop; and another schedule compiles nothing.

    Tolerance 1e-5 relative L2, as for the exact sampler.
    """
    caching = dataclasses.replace(JOINT, compute=(True, False, True))
    made, exact = (each(model, conditions, noise) for each in (caching, JOINT))
    compiled = denoise._cache_size()
    expected = slow_loop(model, conditions, noise, 2.5, repeated=(1,))
    error = np.linalg.norm(made - expected) / np.linalg.norm(expected)
    assert error < 1e-5
    assert np.linalg.norm(made - exact) > 1e-3 * np.linalg.norm(exact)
    everything = dataclasses.replace(JOINT, compute=(True,) * STEPS)
    made = everything(model, conditions, noise)
    assert np.linalg.norm(made - exact) < 1e-5 * np.linalg.norm(exact)
    assert denoise._cache_size() == compiled


@pytest.mark.parametrize("repeated", [(), (1,)])
def test_guidance_is_that_of_the_guided_steps_alone(model, conditions, noise, repeated):
    """Whether or not the blocks are run in all; and another stretch compiles nothing.

    Tolerance 1e-5 relative L2, as for the exact sampler.
    """
    compute = tuple(i not in repeated for i in range(STEPS)) if repeated else None
    cached = dataclasses.replace(JOINT, compute=compute)
    sizes = []
    for unguided in ((2,), (1, 2)):
        guided = tuple(i not in unguided for i in range(STEPS))
        made = dataclasses.replace(cached, guided=guided)(model, conditions, noise)
        kinds = dict(repeated=repeated, unguided=unguided)
        expected = slow_loop(model, conditions, noise, 2.5, **kinds)
        assert np.linalg.norm(made - expected) < 1e-5 * np.linalg.norm(expected)
        sizes.append(denoise._cache_size())
    assert sizes[0] == sizes[1]


def test_a_stretch_of_guided_steps_is_read_off_a_config():
    """Where guidance returns, the other passes have no fresh residual to repeat."""
    sample = ConfigDict(
        dict(num_steps=10, shift=3, guidance="joint", scales=[2], keep_keys=False)
        | dict(preset="draft", ratios=(), guided=(0.0, 0.6))
    )
    assert sum(read_sampler(sample).guided) == 6
    compute = read_sampler(sample).compute
    sample.guided = (0.0, 1.0)
    assert read_sampler(sample).guided is None
    assert read_sampler(sample).compute == compute
    off = [step for step, runs in enumerate(compute) if not runs][-1]
    sample.guided = (off / 10, 1.0)
    assert read_sampler(sample).compute[off]
    sample.guided = (0.5, 0.5)
    with pytest.raises(ValueError, match="shares of the steps at which guidance"):
        read_sampler(sample)


def test_teacache_is_chosen_by_config_and_looks_at_the_models_time_embeddings(
    model, conditions, noise
):
    """The video is that of the schedule which it gives, by the same program."""
    sample = ConfigDict(
        dict(num_steps=STEPS, shift=3, guidance="joint", scales=[2.5], keep_keys=False)
        | dict(preset="teacache", ratios=(), guided=(0.0, 1.0))
        | dict(teacache=("i2v_14b_480p", True, 0.26))
    )
    kind, threshold = TEACACHE["i2v_14b_480p", True], 0.26
    assert read_sampler(sample).teacache == (kind, threshold)
    linear = TeaCache((0.0, 0.0, 0.0, 1.0, 0.0), False, first=1, last=1)
    sampler = dataclasses.replace(read_sampler(sample), teacache=(linear, 1e9))
    assert sampler.computed(model) == (True, *[False] * (STEPS - 2), True)
    for projected in (False, True):
        way = linear._replace(projected=projected, last=0)
        times = jnp.asarray(unipc.make_steps(STEPS, 3.0).timestep)
        seen = model.embed_time(times)[projected]
        rows = np.asarray(seen).reshape(STEPS, -1)
        moved = np.abs(np.diff(rows, axis=0)).mean(1) / np.abs(rows[:-1]).mean(1)
        threshold = float(moved[:2].sum()) * (1 - 1e-4)  # reached by the second
        computed = dataclasses.replace(sampler, teacache=(way, threshold))
        assert computed.computed(model)[:3] == (True, False, True)
    told = dataclasses.replace(sampler, teacache=None, compute=sampler.computed(model))
    made = sampler(model, conditions, noise)
    np.testing.assert_array_equal(made, told(model, conditions, noise))
    sample.teacache = ("i2v_14b", True, 0.26)
    with pytest.raises(ValueError, match="coefficients to take .i2v_14b_480p"):
        read_sampler(sample)


def test_a_schedule_for_another_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="2 steps are said to be .* of 3"):
        dataclasses.replace(JOINT, compute=(True, False))


def test_left_out_conditions_are_out_of_every_pass():
    """Joint guidance with nothing to guide is a single unconditional pass."""
    ((weight, seen),) = without("pose", "geo").passes()
    assert (weight, seen.without) == (1.0, {"pose", "geo"})
    assert all("geo" in seen.without for _, seen in without("geo").passes())
    assert any("pose" not in seen.without for _, seen in without("geo").passes())


def without(*names: str) -> Sampler:
    return dataclasses.replace(JOINT, without=names)


def test_dropped_conditions_are_left_out_by_the_program_that_is_there(
    model, conditions, noise
):
    """And make other latents, so that something was dropped.

    Tolerance 1e-5 of latents of about 1: one pass more, whose weights add up to 0.
    """
    made = JOINT(model, conditions, noise)
    compiled = denoise._cache_size()
    ways = [("geo",), ("pose",), ("pose", "geo")]
    dropped = [JOINT(model, drop(conditions, *way), noise) for way in ways]
    assert denoise._cache_size() == compiled
    for way, latents in zip(ways, dropped, strict=True):
        left_out = without(*way)(model, conditions, noise)
        scale = np.abs(left_out).max()
        np.testing.assert_allclose(latents, left_out, rtol=0, atol=1e-5 * scale)
        assert np.abs(latents - made).max() > 0.01 * scale


def test_only_known_conditions_can_be_left_out(conditions):
    with pytest.raises(ValueError, match="without=depth,text: choose of"):
        without("text", "depth")
    with pytest.raises(ValueError, match="without=depth: choose of"):
        drop(conditions, "depth")


def test_noise_of_a_clip_is_the_same_in_any_batch():
    key = jax.random.key(0)
    ids = np.array([3, 1, 2**32 - 1], np.uint32)
    noise = np.asarray(draw_noise(key, jnp.asarray(ids), (2, 3)))
    order = [2, 0, 1]
    shuffled = draw_noise(key, jnp.asarray(ids[order]), (2, 3))
    np.testing.assert_array_equal(shuffled, noise[order])
    alone = draw_noise(key, jnp.asarray(ids[1:2]), (2, 3))
    np.testing.assert_array_equal(alone, noise[1:2])
    assert not np.array_equal(noise[0], noise[1])


def test_text_guidance_asks_for_the_negative_prompt(model, conditions, noise):
    sampler = Sampler(STEPS, guidance="text", scales=(5.0,))
    with pytest.raises(ValueError, match="negative"):
        sampler(model, conditions, noise)


def test_sampler_is_read_off_a_config():
    sample = ConfigDict(
        dict(num_steps=7, shift=3, guidance="geo", scales=[2], keep_keys=True)
        | dict(preset="final", ratios=(), guided=(0.0, 1.0))
    )
    assert read_sampler(sample) == Sampler(7, 3.0, "geo", (2.0,), keep_keys=True)
    assert "geo" in read_sampler(sample, ("geo",)).passes()[0][1].without


def test_ratios_of_residuals_are_those_of_a_slow_loop(model, conditions, noise):
    """Mean over tokens; 1e-4 relative: float32 norms along the sampler's own path."""
    steps = unipc.make_steps(STEPS, 3.0)
    ratios = residual_ratios(model, conditions, noise, steps)
    last, expected = None, [1.0]

    def look(x, timestep):
        nonlocal last
        (full, _), (residual, _) = both_velocities(model, conditions, x, timestep)
        length = np.linalg.norm(np.asarray(residual, np.float64), axis=-1)
        if last is not None:
            expected.append((length / last).mean())
        last = length
        return np.asarray(full)

    x = corrected = np.asarray(noise)
    before = recent = np.zeros_like(x)
    for i in range(STEPS):
        data = x - steps.sigma[i] * look(x, steps.timestep[i])
        a, b = steps.corrector[i], steps.predictor[i]
        parts = (corrected, before, recent, data)
        corrected = sum(w * part for w, part in zip(a, parts, strict=True))
        x = b[0] * corrected + b[1] * recent + b[2] * data
        before, recent = recent, data
    np.testing.assert_allclose(ratios, expected, rtol=1e-4)
