"""Conditioning against the official routine's numbers and the autoencoder's truths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_batch import make_clip

from cityrag_jax.encode import (
    encode_clips,
    encode_conditions,
    encode_videos,
    first_frame_conditioning,
    fit_pixel_budget,
    resize_bicubic,
    to_pixels,
    to_unit,
)
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import layout, make_mesh


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE(VAEConfig(base_dim=4), rngs=nnx.Rngs(0))


def test_resize_equals_the_reference_kernel():
    """Tolerance 1e-5 as the golden states: float32 sums of sixteen terms."""
    golden = np.load("tests/golden/resize.npz")
    cases = [name[:-3] for name in golden.files if name.endswith("_in")]
    assert cases
    for case in cases:
        image = np.moveaxis(golden[f"{case}_in"][0], 0, -1)
        expected = np.moveaxis(golden[f"{case}_out"][0], 0, -1)
        resized = resize_bicubic(image, expected.shape[:2])
        np.testing.assert_allclose(resized, expected, atol=1e-5)


def test_sizes_equal_the_official_rule_exactly():
    """Rows of the golden: picture, pixel budget, latent grid; 480x832 gives 464x832."""
    rows = np.load("tests/golden/resize.npz")["grid_rows"]
    for height, width, area, latent_height, latent_width in rows.tolist():
        size = fit_pixel_budget(height, width, area)
        assert size == (8 * latent_height, 8 * latent_width)
    assert fit_pixel_budget(480, 832, 480 * 832) == (464, 832)


def test_pixels_survive_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(to_unit(pixels)), pixels)


def test_first_frame_latent_equals_the_image_encoded_alone(vae):
    """The encoder is causal; the frames behind are encodings of grey, not zeros."""
    image = jax.random.uniform(jax.random.key(0), (16, 32, 3), minval=-1)
    made = jax.jit(first_frame_conditioning, static_argnums=2)(vae, image, 9)
    assert made.shape == (3, 2, 4, 20)
    np.testing.assert_array_equal(made[0, ..., :4], 1)
    np.testing.assert_array_equal(made[1:, ..., :4], 0)
    alone = jax.jit(WanVAE.encode)(vae, image[None, None])[0, 0]
    np.testing.assert_allclose(made[0, ..., 4:], alone, atol=1e-5)
    assert float(jnp.abs(made[1:, ..., 4:]).max()) > 1e-3


def test_conditions_of_a_clip_have_the_transformers_shapes(vae):
    clip = make_clip((2,))
    text = np.ones((1, 5), np.float32)
    conditions = jax.eval_shape(encode_conditions, vae, clip, text)
    assert jax.eval_shape(encode_videos, vae, clip.frames)[0].shape == (2, 3, 2, 4, 16)
    assert conditions.text.shape == (2, 1, 5)
    assert conditions.first_frame.shape == (2, 3, 2, 4, 20)
    assert conditions.geo_latents.shape == (2, 4, 2, 4, 16)


def test_a_condition_of_no_frames_is_dropped_and_keeps_a_length_for_the_kernel(vae):
    clip = make_clip((2,))
    lengths = np.array([0, 1], np.int32)
    clip = type(clip)(**{**vars(clip), "condition_length": lengths})
    encode = jax.jit(encode_conditions)
    made = encode(vae, clip, np.ones((1, 5), np.float32))
    np.testing.assert_array_equal(made.keep_geo, [0.0, 1.0])
    np.testing.assert_array_equal(made.geo_length, [1, 1])


@pytest.mark.parametrize(
    ("mesh", "clips", "videos"),
    [((1, 1, 8), 4, 1), ((2, 2, 2), 4, 1), ((1, 1, 8), 1, 1), ((2, 2, 2), 8, 2)],
)
def test_all_devices_share_the_videos_of_a_batch(vae, rng, mesh, clips, videos):
    """Each encodes so many of the two a clip, of 13 frames, and one first image."""
    clip = make_clip((clips,))
    frames = rng.integers(0, 256, clip.condition.shape, dtype=np.uint8)
    changes = dict(frames=frames[:, : clip.frames.shape[1]], condition=frames)
    clip = type(clip)(**{**vars(clip), **changes})
    text = np.ones((1, 5), np.float32)
    programs = [jax.jit(encode_clips).lower(vae, clip, text).compile()]
    with layout(make_mesh(*mesh)):
        programs.append(jax.jit(encode_clips).lower(vae, clip, text).compile())
        spread = programs[1](vae, clip, text)
    whole = programs[0](vae, clip, text)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # other convolutions
    flops = [program.cost_analysis()["flops"] for program in programs]
    frames = clips * (9 + 13 + 9)
    assert flops[1] / flops[0] < 1.1 * (videos * 13 + 9) / frames


def test_generation_sees_what_training_sees(vae, rng):
    """A clip that holds frame 0 alone makes the same conditions as the whole clip."""
    clip = make_clip((1,))
    frames = rng.integers(0, 256, clip.frames.shape, dtype=np.uint8)
    whole = type(clip)(**{**vars(clip), "frames": frames})
    first = type(clip)(**{**vars(clip), "frames": frames[:, :1]})
    text = np.ones((1, 5), np.float32)
    encode = jax.jit(encode_conditions)
    trained, generated = (encode(vae, c, text) for c in (whole, first))
    np.testing.assert_array_equal(trained.geo_length, [3])  # 11 frames
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(generated), strict=True):
        np.testing.assert_array_equal(a, b)
