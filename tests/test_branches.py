"""The two branches: silent at first, dropped exactly, and able to carry a clip."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import SAME_BITS
from flax import nnx

from cityrag_jax.batch import Conditions
from cityrag_jax.diffusion import flow
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch, copy_from_base
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder

TINY = DiTConfig(
    dim=64,
    num_heads=4,
    num_layers=2,
    ffn_dim=128,
    in_channels=16,
    freq_dim=32,
    text_dim=8,
    text_len=1,
)
BATCH, FRAMES, SIZE = 4, 9, (3, 4, 8)  # latents t, h, w of 9 frames


def make_model(key: int = 0, *, silent: bool = True) -> WanDiT:
    """A model with both branches; `silent=False` fills what starts at zero."""
    rngs = nnx.Rngs(key)
    geo = GeoBranch(TINY, same_place_bias=1.0, rngs=rngs)
    pose = TrajectoryEncoder(TINY, hidden=32, rngs=rngs)
    model = WanDiT(TINY, branches=(geo, pose), rngs=rngs)
    kernels = [model.head.linear.kernel]
    if not silent:
        kernels += [geo.layers.attention.o.kernel, pose.projection.kernel]
    for i, kernel in enumerate(kernels):
        noise = jax.random.normal(jax.random.key(i), kernel.shape) * 0.1
        kernel.set_value(noise)
    return model


def make_conditions(seed: int = 0, **changes) -> Conditions:
    keys = jax.random.split(jax.random.key(seed), 2)
    made = Conditions(
        text=jnp.ones((BATCH, 1, 8)),
        geo_latents=jax.random.normal(keys[0], (BATCH, 4, 4, 8, 16)),
        geo_length=jnp.array([3, 4, 2, 1]),
        keep_geo=jnp.ones(BATCH),
        poses=jax.random.normal(keys[1], (BATCH, FRAMES, 4, 4)),
        keep_pose=jnp.ones(BATCH),
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


NOISY = jax.random.normal(jax.random.key(9), (BATCH, *SIZE, 16))
TIMES = jnp.array([0.0, 3.5, 500.0, 999.0])


@functools.partial(jax.jit, compiler_options=SAME_BITS)
def conditioned(model, conditions):
    prepared = model.prepare(conditions)
    return model(NOISY, TIMES, conditions.text, None, prepared)


@functools.partial(jax.jit, compiler_options=SAME_BITS)
def base_alone(model):
    return model(NOISY, TIMES, jnp.ones((BATCH, 1, 8)))


def test_new_branches_leave_the_base_model_exactly_as_it_was():
    model = make_model()
    np.testing.assert_array_equal(
        conditioned(model, make_conditions()), base_alone(model)
    )


def test_a_dropped_condition_contributes_nothing_and_a_kept_one_does():
    """Each clip on its own: `keep` stands behind the output bias."""
    model = make_model(silent=False)
    model.branches[0].layers.attention.o.bias.set_value(jnp.ones((2, 64)))
    model.branches[1].projection.bias.set_value(jnp.ones((2, 64)))
    none = jnp.zeros(BATCH)
    dropped = conditioned(model, make_conditions(keep_geo=none, keep_pose=none))
    np.testing.assert_array_equal(dropped, base_alone(model))
    half = jnp.array([1.0, 0.0, 1.0, 0.0])
    mixed = conditioned(model, make_conditions(keep_geo=half, keep_pose=none))
    changed = np.abs(mixed - dropped).max((1, 2, 3, 4)) > 1e-4
    np.testing.assert_array_equal(changed, half == 1)


def test_poses_of_views_count_where_a_model_sees_them_and_real_views_alone():
    """A new encoder of them changes nothing; what pads the condition never does."""
    rngs = nnx.Rngs(0)
    geo = GeoBranch(TINY, same_place_bias=1.0, view_poses=8, rngs=rngs)
    model = make_model(silent=False)
    given = nnx.state(model.branches[0])
    nnx.update(geo, given)
    views = jax.random.normal(jax.random.key(5), (BATCH, 13, 4, 4))
    conditions = make_conditions(geo_poses=views)
    plain = conditioned(model, conditions)
    model.branches = nnx.data((geo, model.branches[1]))
    np.testing.assert_array_equal(conditioned(model, conditions), plain)
    kernel = geo.view_poses.projection.kernel
    kernel.set_value(jax.random.normal(jax.random.key(6), kernel.shape))
    seen = conditioned(model, conditions)
    assert np.abs(seen - plain).max() > 1e-3
    real = 1 + 4 * (conditions.geo_length - 1)  # frames
    beyond = jnp.arange(13)[None, :] >= real[:, None]
    other = jnp.where(beyond[:, :, None, None], 7.0, views)
    np.testing.assert_array_equal(
        conditioned(model, make_conditions(geo_poses=other)), seen
    )


def test_a_condition_dropped_for_the_batch_is_not_computed():
    """Guidance's second pass costs no geo: the branch is absent from the program."""
    model = make_model(silent=False)

    def call(pose: bool, geo: bool):
        given = {"pose": pose, "geo": geo}
        without = [name for name, there in given.items() if not there]

        def run(model, conditions):
            prepared = model.prepare(conditions, without=without)
            return model(NOISY, TIMES, conditions.text, None, prepared)

        return jax.jit(run).lower(model, make_conditions()).compile()

    flops = {
        (pose, geo): call(pose, geo).cost_analysis()["flops"]
        for pose, geo in ((True, True), (True, False), (False, False))
    }
    base = base_alone.lower(model).compile().cost_analysis()["flops"]
    assert flops[True, True] > flops[True, False] > flops[False, False]
    assert flops[False, False] <= base
    dropped = make_conditions(keep_geo=jnp.zeros(BATCH))
    without = call(True, False)(model, make_conditions())
    np.testing.assert_allclose(without, conditioned(model, dropped), atol=1e-5)


def test_condition_frames_beyond_the_length_do_not_exist():
    model = make_model(silent=False)
    conditions = make_conditions()
    latents = conditions.geo_latents
    beyond = jnp.arange(4)[None, :] >= conditions.geo_length[:, None]
    spoilt = jnp.where(beyond[..., None, None, None], 1e3, latents)
    np.testing.assert_array_equal(
        conditioned(model, conditions),
        conditioned(model, make_conditions(geo_latents=spoilt)),
    )


def test_pose_groups_follow_the_autoencoder():
    """Frame 0 alone, then fours; trailing frames that fill no group still count one."""
    encoder = TrajectoryEncoder(TINY, hidden=32, rngs=nnx.Rngs(0))
    for frames, latents in ((61, 16), (73, 19), (81, 21), (9, 3)):
        poses = jax.random.normal(jax.random.key(0), (1, frames, 4, 4))
        assert encoder.embed(poses).shape == (1, latents, 32)
    poses = jax.random.normal(jax.random.key(0), (1, 9, 4, 4))
    moved = poses.at[:, 5].add(1.0)  # frames 5 to 8 are latent frame 2
    change = jnp.abs(encoder.embed(moved) - encoder.embed(poses)).max((0, 2))
    np.testing.assert_array_equal(change > 0, [False, False, True])


def test_copying_from_the_base_takes_its_attention_and_noise_channels():
    config = dataclasses.replace(TINY, in_channels=36)
    base = WanDiT(config, rngs=nnx.Rngs(0))
    branch = GeoBranch(config, rngs=nnx.Rngs(1))
    copy_from_base(branch, base)
    source, target = base.blocks.self_attention, branch.layers.attention
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(
            getattr(target, name).kernel.get_value(),
            getattr(source, name).kernel.get_value(),
        )
    np.testing.assert_array_equal(target.o.kernel.get_value(), 0)
    np.testing.assert_array_equal(
        branch.patch_embedding.kernel.get_value(),
        base.patch_embedding.kernel.get_value()[: 4 * 16],
    )


@pytest.mark.parametrize("output, scale", [("copy", 1), ("scaled_copy", 0.1)])
def test_a_branch_may_start_with_the_output_projections_of_the_base(output, scale):
    base = WanDiT(TINY, rngs=nnx.Rngs(0))
    source = base.blocks.self_attention.o
    source.bias.set_value(jnp.ones_like(source.bias.get_value()))
    branch = GeoBranch(TINY, output=output, rngs=nnx.Rngs(1))
    assert not branch.layers.attention.o.kernel.get_value().any()  # before the base
    copy_from_base(branch, base)
    for name in ("kernel", "bias"):
        target = getattr(branch.layers.attention.o, name).get_value()
        expected = scale * getattr(source, name).get_value()
        np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("output", ["zero", "copy"])
def test_a_branch_keeps_its_type_beside_a_frozen_base_of_another(output):
    half = dataclasses.replace(TINY, param_dtype=jnp.bfloat16)
    base = WanDiT(half, rngs=nnx.Rngs(0))
    branch = GeoBranch(TINY, output=output, rngs=nnx.Rngs(1))
    copy_from_base(branch, base)
    attention = branch.layers.attention
    for linear in (attention.q, attention.o, branch.patch_embedding):
        assert linear.kernel.get_value().dtype == jnp.float32


def test_another_start_of_the_output_projections_is_refused():
    with pytest.raises(ValueError, match="'one'; choose of .*scaled_copy"):
        GeoBranch(TINY, output="one", rngs=nnx.Rngs(1))


def train_on(content_of, steps: int = 400) -> tuple[float, float]:
    """Train on random content that stands only in a condition; first and last loss."""
    graph, params = nnx.split(make_model())
    optimizer = optax.adam(2e-3)

    def loss(params, key):
        content, conditions = content_of(key)
        sigma, noise = flow.draw(
            key, jnp.arange(BATCH, dtype=jnp.uint32), content.shape[1:], 3.0
        )
        model = nnx.merge(graph, params)
        noisy = flow.interpolate(content, noise, sigma)
        times = flow.timesteps_of(sigma)
        prepared = model.prepare(conditions)
        velocity = model(noisy, times, conditions.text, None, prepared)
        return flow.loss(velocity, noise, content)[0]

    @jax.jit
    def step(params, state, key):
        value, gradients = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    losses = []
    for i in range(steps):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(value)
    return float(np.mean(losses[:20])), float(np.mean(losses[-20:]))


def content_in_condition(key):
    content = jax.random.normal(key, (BATCH, *SIZE, 16))
    ones = jnp.full(BATCH, SIZE[0])
    latents = jnp.pad(content, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    return content, make_conditions(geo_latents=latents, geo_length=ones)


def content_in_poses(key):
    levels = jax.random.normal(key, (BATCH, SIZE[0], 1, 1, 1))
    content = jnp.broadcast_to(levels, (BATCH, *SIZE, 16))
    frames = levels[..., 0][:, np.repeat(np.arange(3), [1, 4, 4])]
    return content, make_conditions(poses=jnp.broadcast_to(frames, (BATCH, 9, 4, 4)))


def content_nowhere(key):
    content, _ = content_in_condition(key)
    return content, make_conditions()


@functools.cache
def blind_loss() -> float:
    """What is left of the loss when the content is nowhere to be seen."""
    return train_on(content_nowhere, steps=100)[1]


@pytest.mark.parametrize("content", [content_in_condition, content_in_poses])
def test_a_tiny_model_learns_content_that_stands_only_in_a_condition(content):
    """An ignored branch cannot pass: random content is nowhere else to be seen.

    Without the condition the best loss on unit-variance content is about that of a
    Gaussian of known variance; with it, 0.
    """
    start = time.monotonic()
    first, last = train_on(content)
    assert last < 0.5 * first, (first, last)
    assert last < 0.6 * blind_loss(), (last, blind_loss())
    assert time.monotonic() - start < 240
