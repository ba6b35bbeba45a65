"""Clips: what they show, where conditions face, exact resume, any process count."""

import dataclasses
import shutil
import time
import uuid
from pathlib import Path

import jax
import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.data import clips, loader
from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.data.pairs import PairConfig, load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.geo.grounding import Views
from cityrag_jax.geo.panorama import crop_panorama
from cityrag_jax.geo.trajectory import headings, yaw_rotation
from cityrag_jax.toy.build import build_toy_city, toy_config

CONFIG = clips.ClipConfig(
    num_frames=9,
    height=32,
    width=48,
    condition_frames=(7, 11),
    yaw_rate_deg=(2.0, 8.0),
)
MINING = PairConfig(num_frames=9, min_condition=7, stride=2, held_out=(1,))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two streets of two drives, the second street held out."""
    drives = [
        synthetic.line([0, 0, 2], 20, 40),
        synthetic.line([2, -1, 2], 20, 30, 0.7),
        synthetic.line([500, 0, 2], 110, 40),
        synthetic.line([499.316, -1.879, 2], 110, 40),
    ]
    folder = tmp_path_factory.mktemp("cities") / "gradient"
    city = synthetic.build(folder, drives, neighbourhoods=[0, 0, 1, 1])
    return city, mine_pairs(city.captures, city.name, MINING)


def take(source, count, **kwargs):
    city, pairs = source
    kwargs = {"batch_size": 4, "seed": 3, "num_threads": 2, **kwargs}
    batches = loader.training_clips([(city, pairs.training)], CONFIG, **kwargs)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def equal(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def seen_heading(frame):
    """Read the compass heading off a direction picture's middle."""
    middle = frame[14:18, 22:26].reshape(-1, 3).mean(0) - 127.5
    return np.arctan2(middle[0], middle[1])


def test_shapes_types_and_padding(source):
    city, pairs = source
    clip = clips.make_clip(
        city,
        clips.plan_clip(city, pairs, 0, CONFIG, np.random.default_rng(0)),
        CONFIG,
    )
    length = int(clip.condition_length)
    assert clip.frames.shape == (9, 32, 48, 3) and clip.frames.dtype == np.uint8
    assert clip.condition.shape == (11, 32, 48, 3) and 7 <= length <= 11
    assert clip.first_from_camera.dtype == np.float32
    np.testing.assert_allclose(clip.first_from_camera[0], np.eye(4), atol=1e-7)
    for frame in clip.condition[length:]:
        np.testing.assert_array_equal(frame, clip.condition[length - 1])
    views = clip.first_from_view
    assert views.shape == (11, 4, 4) and views.dtype == np.float32
    np.testing.assert_array_equal(views[length:], [views[length - 1]] * (11 - length))


def test_views_stand_where_their_captures_do_and_look_where_they_face(source):
    """Seen from the target's first camera; ECEF is millions of metres, float32 not."""
    city, pairs = source
    plan = clips.plan_clip(city, pairs, 1, CONFIG, np.random.default_rng(1))
    views = clips.make_clip(city, plan, CONFIG).first_from_view
    views = plan.ecef_from_camera[0] @ views[: len(plan.condition_captures)]
    captures = city.captures.ecef_from_camera[plan.condition_captures]
    np.testing.assert_allclose(views[:, :3, 3], captures[:, :3, 3], atol=1e-4)
    turned = headings(captures) + plan.condition_yaw_rad
    apart = np.angle(np.exp(1j * (headings(views) - turned)))
    np.testing.assert_allclose(apart, 0, atol=1e-5)


def test_frames_look_where_their_poses_say(source):
    """The pictures show world directions: pose and picture must agree in every frame.

    JPEG and 8 bits leave half a degree.
    """
    city, pairs = source
    for pair in (0, 3, len(pairs) - 1):
        plan = clips.plan_clip(city, pairs, pair, CONFIG, np.random.default_rng(pair))
        clip = clips.make_clip(city, plan, CONFIG)
        expected = headings(plan.ecef_from_camera)
        seen = np.array([seen_heading(frame) for frame in clip.frames])
        assert np.rad2deg(np.abs(np.angle(np.exp(1j * (seen - expected))))).max() < 1


def test_condition_faces_as_the_target_at_the_same_place(source):
    """Street 1's drives go side by side, capture by capture: headings must be equal."""
    city, pairs = source
    side_by_side = pairs.evaluation
    plan = clips.plan_clip(city, side_by_side, 0, CONFIG, np.random.default_rng(5))
    clip = clips.make_clip(city, plan, CONFIG)
    for k in range(min(9, int(clip.condition_length))):
        difference = seen_heading(clip.frames[k]) - seen_heading(clip.condition[k])
        assert np.rad2deg(np.abs(np.angle(np.exp(1j * difference)))) < 2


def test_plan_tells_exactly_what_the_clip_shows(source):
    """Provenance: the truth of a frame can be made again from the plan alone."""
    city, pairs = source
    plan = clips.plan_clip(city, pairs, 1, CONFIG, np.random.default_rng(1))
    clip = clips.make_clip(city, plan, CONFIG)
    for shown, captures, yaw in (
        (clip.frames, plan.target_captures, plan.target_yaw_rad),
        (clip.condition, plan.condition_captures, plan.condition_yaw_rad),
    ):
        exact = crop_panorama(
            city.panorama(int(captures[2])),
            float(yaw[2]),
            height=32,
            width=48,
            fov_rad=np.deg2rad(65.0),
        )
        assert np.abs(shown[2] - exact).max() <= 1.5
    poses = city.captures.ecef_from_camera[plan.target_captures]
    np.testing.assert_array_equal(
        plan.ecef_from_camera, poses @ yaw_rotation(plan.target_yaw_rad)
    )
    assert np.all(np.diff(plan.condition_captures) == 1)
    assert plan.condition_captures[0] == pairs.start_b[1]


def test_condition_lengths_cover_their_range_and_end_with_the_drive(source):
    city, pairs = source
    lengths = [
        len(
            clips.plan_clip(
                city, pairs, 0, CONFIG, np.random.default_rng(seed)
            ).condition_captures
        )
        for seed in range(60)
    ]
    assert set(lengths) == set(range(7, 12))
    stops = city.index.drive_edges
    for pair in range(len(pairs)):
        plan = clips.plan_clip(city, pairs, pair, CONFIG, np.random.default_rng(pair))
        drive = np.searchsorted(stops, plan.condition_captures, "right")
        assert len(set(drive.tolist())) == 1 and len(drive) >= 7


def test_generation_makes_the_condition_that_training_makes(source):
    city, pairs = source
    plan = clips.plan_clip(city, pairs, 2, CONFIG, np.random.default_rng(2))
    trained = clips.make_clip(city, plan, CONFIG)
    captures = plan.condition_captures
    facing = headings(city.captures.ecef_from_camera[captures])
    nothing = np.zeros(len(captures))
    views = Views(captures, plan.condition_yaw_rad + facing, nothing, nothing)
    path = plan.ecef_from_camera
    made = clips.path_clip(city, trained.frames[0], path, views, CONFIG, 7)
    assert made.frames.shape == (1, 32, 48, 3) and int(made.clip_id) == 7
    for name in ("first_from_camera", "condition", "condition_length"):
        np.testing.assert_array_equal(getattr(made, name), getattr(trained, name))
    # A view's yaw is its heading less that of its capture, which rounds.
    np.testing.assert_allclose(made.first_from_view, trained.first_from_view, atol=1e-5)
    nowhere = clips.path_clip(city, trained.frames[0], path, views[:0], CONFIG)
    np.testing.assert_array_equal(nowhere.first_from_view, [np.eye(4)] * 11)
    with pytest.raises(ValueError, match="resize it"):
        clips.path_clip(city, np.zeros((8, 8, 3), np.uint8), path, views, CONFIG)


def test_training_resumes_exactly_from_a_step_alone(source):
    whole = take(source, 25)
    for start in (1, 13, 20):
        later = take(source, 3, start_step=start, num_threads=1)
        assert all(map(equal, later, whole[start:]))
    assert not equal(whole[0], take(source, 1, seed=4)[0])


def test_epochs_show_every_pair_once_in_another_order_and_another_way(source):
    _, pairs = source
    steps = len(pairs.training) // 4
    taken = take(source, 2 * steps)
    first = np.concatenate([b.clip_id for b in taken[:steps]])
    second = np.concatenate([b.clip_id for b in taken[steps:]])
    assert len(set(first.tolist())) == len(first) == 4 * steps
    assert len(pairs.training) % 4 or set(first.tolist()) == set(second.tolist())
    assert first.tolist() != second.tolist()
    one = first[0]
    shown = [
        batch.frames[k]
        for batch in taken
        for k in np.flatnonzero(batch.clip_id == one).tolist()
    ]
    assert len(shown) == 2 and not np.array_equal(*shown)


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 3], [2], [1, 3], [1]]])
def test_a_row_holds_the_same_clip_whichever_process_feeds_it(source, shares):
    """Replicas hold equal rows, and those of a process need not be neighbours."""
    whole = take(source, 4, start_step=2)
    for rows in shares:
        taken = take(source, 4, start_step=2, rows=rows)
        for step in range(4):
            expected = jax.tree.map(lambda x, rows=rows: x[rows], whole[step])
            assert equal(taken[step], expected)


class CountedCity(City):
    """Leaves a file for every clip that is read of it, in any process."""

    def crops(self, *args, **kwargs):
        (Path(self.folder) / "read").mkdir(exist_ok=True)
        (Path(self.folder) / "read" / uuid.uuid4().hex).touch()
        return super().crops(*args, **kwargs)

    def __reduce__(self):
        return CountedCity, (self.folder,)

    @property
    def index(self):
        raise AssertionError("a loader needs no index: in each worker it costs memory")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_holds_two_batches_ahead(source, tmp_path, workers):
    """However long the consumer takes, whatever the threads; no index is built."""
    city, pairs = source
    shutil.copytree(city.folder, tmp_path / "city")
    batches = loader.training_clips(
        [(CountedCity(tmp_path / "city"), pairs.training)],
        CONFIG,
        batch_size=4,
        seed=3,
        num_threads=8,
        num_workers=workers,
    )
    next(batches)
    read = before = 0
    while not read or read != before:  # until the loader has nothing more to do
        time.sleep(1)
        read, before = len(list((tmp_path / "city" / "read").iterdir())) // 2, read
    batches.close()
    assert 4 < read - 4 <= max(2 * 4, 5 * workers)


def test_worker_processes_change_nothing(source):
    whole = take(source, 5, start_step=1)
    workers = take(source, 5, start_step=1, num_workers=2)
    assert all(map(equal, workers, whole))


def test_held_out_clips_are_always_the_same_and_turn(source):
    city, pairs = source
    plans = clips.held_out_plans(city, pairs, CONFIG, 5, min_rotation_deg=30.0)
    again = clips.held_out_plans(city, pairs, CONFIG, 5, min_rotation_deg=30.0)
    for one, other in zip(plans, again, strict=True):
        np.testing.assert_array_equal(one.ecef_from_camera, other.ecef_from_camera)
        np.testing.assert_array_equal(one.condition_captures, other.condition_captures)
        assert one.rotation_deg >= 30
        assert (city.captures.neighbourhood[one.target_captures] == 1).all()
    batch = clips.stack_clips(
        clips.held_out_clips(city, pairs, CONFIG, 3, min_rotation_deg=30.0)
    )
    assert batch.frames.shape == (3, 9, 32, 48, 3)
    assert batch.clip_id.tolist() == [plan.clip_id for plan in plans[:3]]
    with pytest.raises(ValueError, match="0 of them turn 170.0 degrees"):
        clips.held_out_plans(city, pairs, CONFIG, 5, min_rotation_deg=170.0)


def test_what_does_not_fit_is_named(source):
    city, pairs = source
    longer = dataclasses.replace(CONFIG, num_frames=10)
    with pytest.raises(ValueError, match="pairs are 9 frames long, clips 10"):
        clips.plan_clip(city, pairs, 0, longer, np.random.default_rng(0))
    nothing = pairs.select(np.zeros(len(pairs), bool))
    with pytest.raises(ValueError, match="No training pairs in .*gradient"):
        loader.training_clips([(city, nothing)], CONFIG, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="give 1 <= shortest"):
        clips.ClipConfig(condition_frames=(5, 3))
    for wrong, message in (
        (dict(height=0), "of 832x0: give 1 or more"),
        (dict(fov_deg=200.0), "fov_deg is 200.0; a view has between"),
    ):
        with pytest.raises(ValueError, match=message):
            clips.ClipConfig(**wrong)


def test_the_toy_city_goes_all_the_way_from_streets_to_clips(tmp_path):
    config = toy_config("paris", "test", block_m=30.0, route_streets=1, supersample=1)
    city = build_toy_city(config, tmp_path / "paris", height=32, num_frames=17)
    pairs = load_pairs(city.folder)
    assert len(pairs.training) > 0 and len(pairs.evaluation) > 0
    assert city.header.generator["toy_city"]["name"] == "paris"
    chosen = dataclasses.replace(CONFIG, num_frames=17, condition_frames=(14, 19))
    (clip,) = clips.held_out_clips(city, pairs, chosen, 1)
    assert clip.frames.shape == (17, 32, 48, 3)
    assert clip.frames.std() > 5  # a picture, not one colour
    # Frames are a fraction of a metre apart.
    steps = np.linalg.norm(np.diff(clip.first_from_camera[:, :3, 3], axis=0), axis=1)
    assert steps.max() < 0.8
