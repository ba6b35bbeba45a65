"""Clips chained along a path, with a generator that paints what it was given."""

import jax
import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import Bundle, abstract_model, describe
from cityrag_jax.data.clips import ClipConfig
from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.trajectory import relative_poses
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.rollout import Generator, retrieve, rollout, segments
from cityrag_jax.sampling import Sampler

CONFIG = ClipConfig(num_frames=5, height=16, width=32, condition_frames=(5, 7))
FIRST = np.full((16, 32, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def city(tmp_path_factory) -> City:
    """Two drives north along one street, 20 m long."""
    drives = [synthetic.line([0, 0, 2], 0, 40), synthetic.line([1.5, -1, 2], 0, 40)]
    return synthetic.build(tmp_path_factory.mktemp("rollout") / "city", drives)


def north(num: int, start=(0.5, 2.0, 2.0)) -> np.ndarray:
    """Poses every metre along the street, on Earth."""
    return ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line(start, 0, num, 1.0)


class Painter:
    """Keeps its clips, and answers with noise of seed and clip behind frame 0."""

    def __init__(self):
        self.clips = []

    def __call__(self, clip: Clip, seed: int):
        self.clips.append(jax.tree.map(lambda x: x[0], clip))
        rng = np.random.default_rng([seed, int(clip.clip_id[0])])
        frames = clip.first_from_camera.shape[1]
        made = rng.integers(256, size=(1, frames, *clip.frames.shape[2:]))
        made[:, 0] = 255 - clip.frames[:, 0]  # an autoencoder never gives it back
        return made.astype(np.uint8)


def test_segments_share_a_pose_and_repeat_the_last():
    assert [s.tolist() for s in segments(9, 5)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert [s.tolist() for s in segments(7, 5)] == [[0, 1, 2, 3, 4], [4, 5, 6, 6, 6]]
    assert [s.tolist() for s in segments(2, 5)] == [[0, 1, 1, 1, 1]]
    assert [s.tolist() for s in segments(1, 5)] == [[0] * 5]


@pytest.mark.parametrize("num_poses", (1, 2, 5, 6, 9, 11))
def test_every_pose_gets_one_frame(city, num_poses):
    painter = Painter()
    made = rollout(painter, city, FIRST, north(num_poses), CONFIG)
    assert made.frames.shape == (num_poses, 16, 32, 3)
    np.testing.assert_array_equal(made.frames[0], FIRST)
    clips = max(1, -(-(num_poses - 1) // 4))
    assert len(painter.clips) == len(made.conditions) == len(made.retrievals) == clips


def test_the_last_frame_and_pose_of_a_clip_start_the_next(city):
    painter, path = Painter(), north(11)
    made = rollout(painter, city, FIRST, path, CONFIG)
    for k, clip in enumerate(painter.clips):
        np.testing.assert_array_equal(clip.frames, made.frames[4 * k][None])
        here = path[np.minimum(np.arange(4 * k, 4 * k + 5), 10)]
        np.testing.assert_array_equal(clip.first_from_camera, relative_poses(here))
    # The middle ones are the generator's own, the given image apart.
    painted = Painter()(jax.tree.map(lambda x: x[None], painter.clips[1]), 0)
    np.testing.assert_array_equal(made.frames[5:9], painted[0, 1:])


def test_conditions_look_along_the_path(city):
    """A pixel of this city shows its direction; north is (127.5, 247.5, 127.5)."""
    made = rollout(Painter(), city, FIRST, north(9), CONFIG)
    for condition, retrieval in zip(made.conditions, made.retrievals, strict=True):
        assert len(condition) == len(retrieval.captures) == 7
        np.testing.assert_array_equal(np.diff(retrieval.captures), 1)
        middle = condition[:, 7:9, 15:17].mean(axis=(1, 2))
        np.testing.assert_allclose(middle, [[127.5, 247.5, 127.5]] * 7, atol=3)


def test_equal_arguments_give_equal_bytes(city):
    made = rollout(Painter(), city, FIRST, north(9), CONFIG, seed=3)
    again = rollout(Painter(), city, FIRST, north(9), CONFIG, seed=3)
    other = rollout(Painter(), city, FIRST, north(9), CONFIG, seed=4)
    np.testing.assert_array_equal(made.frames, again.frames)
    assert not np.array_equal(made.frames[1:], other.frames[1:])
    assert not np.array_equal(made.frames[1:5], made.frames[5:9])


def test_progress_is_shown_clip_by_clip(city):
    painter, shown = Painter(), []

    def progress(parts):
        for part in parts:
            shown.append((part[0], len(painter.clips)))
            yield part

    rollout(painter, city, FIRST, north(9), CONFIG, progress=progress)
    assert shown == [(0, 0), (1, 1)]


def test_a_path_that_leaves_the_streets_names_city_and_clip(city):
    """Found before anything is generated."""
    painter, path = Painter(), north(60)
    with pytest.raises(ValueError, match=r"clip 9 of the path \(frames 36 to 40\)"):
        rollout(painter, city, FIRST, path, CONFIG)
    assert painter.clips == []
    with pytest.raises(ValueError, match=f"{city.folder}, clip 0 .* none goes within"):
        retrieve(city, north(9)[::-1].copy(), CONFIG)
    with pytest.raises(ValueError, match="clip 0 .* 0.1 m of the path's start"):
        retrieve(city, north(9), CONFIG, radius_m=0.1)


def test_a_bundle_that_cannot_generate_is_refused():
    """With what it lacks; the parameters are never looked at."""
    vae = abstract_model(describe(WanVAE, VAEConfig(base_dim=4)))
    with pytest.raises(ValueError, match="lacks transformer; generation needs"):
        Generator(Bundle({"vae": vae}, {}), Sampler())
    both = {"vae": vae, "transformer": vae}
    with pytest.raises(ValueError, match="new lacks text features"):
        Generator(Bundle(both, {}), Sampler())
