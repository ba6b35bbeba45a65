"""Clips chained along a path, with a generator that paints what it was given."""

import threading

import jax
import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.batch import Clip
from cityrag_jax.data.clips import ClipConfig
from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.grounding import Retrieval
from cityrag_jax.geo.trajectory import relative_poses
from cityrag_jax.rollout import MadeClip, plan_job, rollout, spans

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


def make(painter, city, path, **options) -> list[MadeClip]:
    return list(rollout(painter, plan_job(city, FIRST, path, CONFIG, **options)))


def join(made: list[MadeClip]) -> np.ndarray:
    return np.concatenate([clip.frames for clip in made])


def test_the_last_clip_ends_with_the_path():
    """Clips share a pose; the last one reaches back, and the one before is cut."""
    assert spans(9, 5) == ((0, 0, 5), (4, 5, 9))
    assert spans(7, 5) == ((0, 0, 3), (2, 3, 7))
    assert spans(10, 5) == ((0, 0, 5), (4, 5, 6), (5, 6, 10))
    assert spans(5, 5) == ((0, 0, 5),)
    assert spans(2, 5) == ((0, 0, 2),)


@pytest.mark.parametrize("num_frames", (2, 5, 9))
def test_every_pose_is_in_one_clip_that_moves(num_frames):
    """No pose twice, none lost; every clip starts at the last pose given before it."""
    for num_poses in range(1, 40):
        given = []
        for span in spans(num_poses, num_frames):
            assert span.first == max(0, len(given) - 1)
            assert span.begin == len(given)
            given += range(span.begin, span.end)
            assert span.end <= span.first + num_frames
            assert span.first + num_frames <= max(num_poses, num_frames)
        assert given == list(range(num_poses))


@pytest.mark.parametrize("num_poses", (1, 2, 5, 6, 9, 11))
def test_every_pose_gets_one_frame(city, num_poses):
    painter = Painter()
    made = make(painter, city, north(num_poses))
    frames = join(made)
    assert frames.shape == (num_poses, 16, 32, 3)
    np.testing.assert_array_equal(frames[0], FIRST)
    clips = max(1, -(-(num_poses - 1) // 4))
    assert len(painter.clips) == len(made) == clips


def test_the_last_frame_and_pose_of_a_clip_start_the_next(city):
    painter, path = Painter(), north(11)
    frames = join(make(painter, city, path))
    starts = [0, 4, 6]
    for start, clip in zip(starts, painter.clips, strict=True):
        np.testing.assert_array_equal(clip.frames, frames[start][None])
        here = path[start : start + 5]
        np.testing.assert_array_equal(clip.first_from_camera, relative_poses(here))
    # The middle ones are the generator's own, the given image apart.
    for k, behind in ((1, slice(5, 7)), (2, slice(7, 11))):
        painted = Painter()(jax.tree.map(lambda x: x[None], painter.clips[k]), 0)
        count = behind.stop - behind.start
        np.testing.assert_array_equal(frames[behind], painted[0, 1 : 1 + count])


def test_only_behind_a_path_shorter_than_a_clip_the_camera_stands(city):
    painter, path = Painter(), north(3)
    make(painter, city, path)
    wanted = relative_poses(path[[0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(painter.clips[0].first_from_camera, wanted)


@pytest.mark.parametrize("way, step", [("by-distance", 2), ("as-driven", 1)])
def test_conditions_look_along_the_path(city, way, step):
    """A pixel of this city shows its direction; north is (127.5, 247.5, 127.5).

    Poses are a metre apart, captures half a metre.
    """
    for clip in make(Painter(), city, north(9), retrieval=Retrieval(way)):
        assert len(clip.condition) == len(clip.views) == 7
        np.testing.assert_array_equal(np.diff(clip.views.captures), step)
        middle = clip.condition[:, 7:9, 15:17].mean(axis=(1, 2))
        np.testing.assert_allclose(middle, [[127.5, 247.5, 127.5]] * 7, atol=3)


def test_equal_arguments_give_equal_bytes(city):
    made = join(make(Painter(), city, north(9), seed=3))
    again = join(make(Painter(), city, north(9), seed=3))
    other = join(make(Painter(), city, north(9), seed=4))
    np.testing.assert_array_equal(made, again)
    assert not np.array_equal(made[1:], other[1:])
    assert not np.array_equal(made[1:5], made[5:9])


def test_clips_come_as_they_are_asked_for(city):
    painter = Painter()
    clips = rollout(painter, plan_job(city, FIRST, north(9), CONFIG))
    assert [(next(clips).number, len(painter.clips)) for _ in range(2)] == [
        (0, 1),
        (1, 2),
    ]


def test_a_rollout_goes_on_from_any_clip(city):
    """To the same frames, and asks the generator for the missing clips alone."""
    job = plan_job(city, FIRST, north(15), CONFIG)
    whole = list(rollout(Painter(), job))
    for start in range(1, len(whole)):
        painter, last = Painter(), whole[start - 1].frames[-1]
        rest = list(rollout(painter, job, start=start, last_frame=last))
        assert len(painter.clips) == len(whole) - start
        np.testing.assert_array_equal(join(rest), join(whole[start:]))
    with pytest.raises(ValueError, match="Clip 2 starts from the last frame before"):
        next(rollout(Painter(), job, start=2))


def test_a_path_that_leaves_the_streets_names_city_and_clip(city):
    """Found before anything is generated: where the last capture is 15 m behind."""
    with pytest.raises(ValueError, match=r"clip 8 of the path \(frames 32 to 36\)"):
        plan_job(city, FIRST, north(60), CONFIG)
    near = Retrieval(radius_m=0.1)
    with pytest.raises(ValueError, match=f"{city.folder}, clip 0 .* is 0.5 m away"):
        plan_job(city, FIRST, north(9), CONFIG, retrieval=near)


def test_a_drive_against_the_path_shows_it_facing_along(city):
    made = make(Painter(), city, north(9)[::-1].copy())
    for clip in made:
        middle = clip.condition[:, 7:9, 15:17].mean(axis=(1, 2))
        np.testing.assert_allclose(middle, [[127.5, 247.5, 127.5]] * 7, atol=3)
        assert np.all(np.diff(clip.views.captures) == -2)


def test_a_stretch_without_captures_goes_without_them_where_that_is_wanted(city):
    """Its clips have a condition of length 0, which drops it."""
    painter, wanted = Painter(), Retrieval(gaps="without-geo")
    made = make(painter, city, north(60), retrieval=wanted)
    lengths = [int(clip.condition_length) for clip in painter.clips]
    assert lengths[:7] == [7] * 7 and lengths[10:] == [0] * len(lengths[10:])
    assert join(made).shape[0] == 60
    assert not made[-1].condition.any() and made[-1].condition.shape[0] == 1


def test_numbers_that_are_not_finite_name_their_clip(city):
    def generate(clip, seed):
        if clip.clip_id[0] == 1:
            raise FloatingPointError("numbers that are not finite")
        return Painter()(clip, seed)

    clips = rollout(generate, plan_job(city, FIRST, north(9), CONFIG))
    next(clips)
    with pytest.raises(FloatingPointError, match=r"clip 1 .*\(frames 4 to 8\): num"):
        next(clips)


def test_the_next_clips_views_are_cropped_while_one_is_generated(city, monkeypatch):
    """The generator waits for them: they come from another thread."""
    job, cropped = plan_job(city, FIRST, north(9), CONFIG), threading.Semaphore(0)
    crops = City.crops

    def crop(*args, **kinds):
        made = crops(*args, **kinds)
        cropped.release()
        return made

    monkeypatch.setattr(City, "crops", crop)
    painter = Painter()

    def generate(clip, seed):
        number = len(painter.clips)
        assert cropped.acquire(timeout=60)
        assert number + 1 == len(job.spans) or cropped.acquire(timeout=60)
        cropped.release()
        return painter(clip, seed)

    assert len(list(rollout(generate, job))) == len(job.spans)


def test_the_next_clips_condition_is_begun_before_a_clip_is_handed_out(city):
    """While its frames are written, devices have something to do: the same video.

    What cannot be cropped leaves the clips before it alone.
    """

    class Beginner(Painter):
        begun = ()

        def begin(self, clip):
            self.begun += (int(clip.clip_id[0]),)
            return clip.condition.sum()

        def __call__(self, clip, seed, begun=None):
            assert (begun is None) == (clip.clip_id[0] == 0)
            assert begun is None or begun == clip.condition.sum()
            return super().__call__(clip, seed)

    job, beginner = plan_job(city, FIRST, north(11), CONFIG), Beginner()
    made = []
    for clip in rollout(beginner, job):
        made.append(clip)
        assert beginner.begun == tuple(range(1, min(clip.number + 2, 3)))
    np.testing.assert_array_equal(join(made), join(list(rollout(Painter(), job))))

    class Torn(type(job)):
        def clip(self, number, frame):
            if number == 1:
                raise ValueError("no such picture")
            return super().clip(number, frame)

    clips = rollout(Beginner(), Torn(**vars(job)))
    np.testing.assert_array_equal(next(clips).frames, made[0].frames)
    with pytest.raises(ValueError, match="no such picture"):
        next(clips)
