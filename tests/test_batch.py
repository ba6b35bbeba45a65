"""Arithmetic of frames, latents and tokens, and the two types as pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cityrag_jax.batch import (
    Clip,
    Conditions,
    latent_frames,
    latent_shape,
    pixel_frames,
    token_grid,
)


def make_clip(batch: tuple[int, ...] = ()) -> Clip:
    return Clip(
        frames=np.zeros((*batch, 9, 16, 32, 3), np.uint8),
        first_from_camera=np.zeros((*batch, 9, 4, 4), np.float32),
        condition=np.zeros((*batch, 13, 16, 32, 3), np.uint8),
        condition_length=np.full(batch, 11, np.int32),
        clip_id=np.zeros(batch, np.uint32),
    )


@pytest.mark.parametrize(
    "frames, latents", [(1, 1), (61, 16), (65, 17), (72, 18), (73, 19), (77, 20)]
)
def test_latent_frames_follow_the_official_encoder(frames, latents):
    assert latent_frames(frames) == latents


def test_pixel_frames_invert_latent_frames():
    assert [latent_frames(pixel_frames(t)) for t in range(1, 30)] == [*range(1, 30)]


def test_73_frames_at_480p_make_29640_tokens():
    grid = token_grid(latent_shape(73, 480, 832))
    assert grid == (19, 30, 52) and np.prod(grid) == 29_640


def test_sides_that_do_not_divide_into_patches_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="multiples of 16, such as 480x832"):
        latent_shape(73, 481, 840)


def test_both_types_pass_through_transformations_with_any_leaf():
    """Grain batches clips and jit, shardings and shapes see conditions as pytrees."""
    clip = make_clip((2,))
    shapes = jax.tree.map(lambda x: x.shape, clip)
    assert shapes.frames == (2, 9, 16, 32, 3)
    on_device = jax.jit(lambda clip: clip)(clip)
    np.testing.assert_array_equal(on_device.condition_length, [11, 11])

    conditions = Conditions(text=jnp.ones((1, 2, 3)))
    forwarded = jax.jit(lambda p: Conditions(text=p[:, 0], poses=p))
    assert isinstance(forwarded(np.ones((1, 2, 4, 4), np.float32)).poses, jax.Array)
    assert jax.tree.map(lambda x: "leaf", conditions).text == "leaf"
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(conditions)
    np.testing.assert_array_equal(doubled.text, 2 * np.ones((1, 2, 3)))
