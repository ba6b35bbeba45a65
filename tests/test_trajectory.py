"""Relative poses, yaw augmentation, drawn paths, and where conditions face."""

import numpy as np
import pytest

from cityrag_jax.geo import trajectory
from cityrag_jax.geo.ecef import ecef_from_enu, ecef_from_geodetic, invert_rigid

ANCHOR = ecef_from_enu(48.137, 11.575, 520.0)


def straight(num: int, heading: float = 0.0, spacing: float = 0.5) -> np.ndarray:
    """Make ecef_from_camera of a level drive through the anchor along a heading."""
    along = np.arange(num) * spacing
    places = along[:, None] * np.array([[np.sin(heading), np.cos(heading), 0.0]])
    return ANCHOR @ trajectory.level_poses(places, np.full(num, heading))


def turned(poses: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    return poses @ trajectory.yaw_rotation(yaw)


def test_relative_poses_equal_the_exact_product_and_start_at_identity():
    """The direct product is good to a nanometre, float32 to 2e-6 of 30 m."""
    poses = turned(straight(60, 0.7), np.linspace(0, 2, 60))
    relative = trajectory.relative_poses(poses)
    exact = np.linalg.inv(poses[0]) @ poses
    assert relative.dtype == np.float32
    np.testing.assert_array_equal(relative[0, :3, 3], 0)
    np.testing.assert_allclose(relative[0], np.eye(4), atol=1e-7)
    np.testing.assert_allclose(relative, exact, atol=4e-6)


def test_relative_poses_do_not_depend_on_the_place_on_earth():
    local = invert_rigid(ANCHOR) @ turned(straight(20), np.linspace(0, 1, 20))
    there = ecef_from_enu(-33.86, 151.2, 40.0) @ local
    np.testing.assert_allclose(
        trajectory.relative_poses(ANCHOR @ local),
        trajectory.relative_poses(there),
        atol=1e-6,
    )


def test_driving_forward_is_plus_z_and_yaw_adds_to_the_heading():
    relative = trajectory.relative_poses(straight(5, 1.1))
    np.testing.assert_allclose(
        relative[:, :3, 3], [[0, 0, k / 2] for k in range(5)], atol=1e-5
    )
    for yaw in (-2.0, 0.3, 1.5):
        poses = turned(straight(2, 0.5), np.full(2, yaw))
        np.testing.assert_allclose(trajectory.headings(poses), 0.5 + yaw, atol=1e-5)


def test_headings_are_compass_directions():
    for heading, expected in [(0, 0), (90, 90), (-90, -90), (179, 179)]:
        poses = straight(1, np.deg2rad(heading))
        assert np.rad2deg(trajectory.headings(poses)[0]) == pytest.approx(expected)


def test_yaw_augmentation_turns_one_way_within_its_rates():
    starts, signs = [], []
    for seed in range(200):
        yaw = trajectory.draw_yaw(np.random.default_rng(seed), 73, (0.5, 4.0))
        steps = np.rad2deg(np.diff(yaw))
        assert np.all(np.sign(steps) == np.sign(steps[0]))
        assert np.abs(steps).min() >= 0.5 - 1e-9 and np.abs(steps).max() <= 4 + 1e-9
        assert np.std(steps) > 0.5  # drawn anew for each gap
        starts.append(yaw[0])
        signs.append(np.sign(steps[0]))
    assert 0 <= min(starts) < 0.3 and 2 * np.pi - 0.3 < max(starts) < 2 * np.pi
    assert abs(np.mean(signs)) < 0.25
    same = [trajectory.draw_yaw(np.random.default_rng(3), 9) for _ in range(2)]
    np.testing.assert_array_equal(*same)


def test_straight_path_stays_straight_at_its_spacing():
    points = np.array([[0.0, 0, 1], [3.0, 4, 1], [6.0, 8, 1]])
    poses = trajectory.poses_along(points, 0.4, turn_radius_m=1.0)
    assert len(poses) == 26
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1), 0.4, atol=1e-6
    )
    np.testing.assert_allclose(poses[-1, :3, 3], points[-1], atol=1e-3)
    np.testing.assert_allclose(poses[:, :2, 2], [[0.6, 0.8]] * 26, atol=1e-6)


def test_corner_is_rounded_and_cameras_face_along_it():
    points = np.array([[0.0, 0, 2], [0.0, 20, 2], [20.0, 20, 2]])
    poses = trajectory.poses_along(points, 0.25, turn_radius_m=2.0)
    steps = np.diff(poses[:, :3, 3], axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 0.25, atol=2e-3)
    heading = np.unwrap(np.arctan2(poses[:, 0, 2], poses[:, 1, 2]))
    assert heading[0] == pytest.approx(0, abs=1e-6)
    assert heading[-1] == pytest.approx(np.pi / 2, abs=1e-6)
    assert np.diff(heading).min() > -1e-9 and np.diff(heading).max() < 1.01 * 0.25 / 2
    motion = steps[1:] + steps[:-1]
    motion /= np.linalg.norm(motion, axis=1, keepdims=True)
    assert np.sum(motion * poses[1:-1, :3, 2], axis=1).min() > 0.9999
    rotation = poses[:, :3, :3]
    np.testing.assert_allclose(
        np.swapaxes(rotation, 1, 2) @ rotation,
        np.tile(np.eye(3), (len(poses), 1, 1)),
        atol=1e-12,
    )


def test_path_on_earth_passes_its_geodetic_points():
    path = np.array([[48.137, 11.575, 520.0], [48.138, 11.575, 520.0]])
    poses = trajectory.poses_on_earth(path, 1.0)
    ends = ecef_from_geodetic(*path.T)
    np.testing.assert_allclose(poses[0, :3, 3], ends[0], atol=1e-6)
    assert np.linalg.norm(poses[-1, :3, 3] - ends[1]) < 1.0
    np.testing.assert_allclose(trajectory.headings(poses), 0, atol=1e-4)


def test_unusable_paths_are_refused():
    point = np.array([[48.137, 11.575, np.nan], [48.138, 11.575, 520.0]])
    with pytest.raises(ValueError, match="fill_heights"):
        trajectory.poses_on_earth(point, 1.0)
    with pytest.raises(ValueError, match="no two places 0.5 m apart"):
        trajectory.resample_path(np.zeros((2, 3)), 0.5)


def test_projection_equals_a_brute_force_search(rng):
    path = np.cumsum(rng.uniform(-1, 1, (12, 3)), axis=0)
    points = rng.uniform(-3, 3, (40, 3))
    fractions = np.linspace(0, 1, 2001)
    vertices = np.arange(11)[:, None] + fractions[None]
    dense = path[:-1, None] + fractions[None, :, None] * np.diff(path, axis=0)[:, None]
    distances = np.linalg.norm(dense.reshape(-1, 1, 3) - points[None], axis=-1)
    place, distance = trajectory.project_on_path(points, path)
    np.testing.assert_allclose(distance, distances.min(0), atol=1e-3)
    np.testing.assert_allclose(
        place, vertices.reshape(-1)[distances.argmin(0)], atol=0.02
    )


def test_a_drive_faces_its_own_target_exactly():
    """Oracle: if the condition is the target's own drive, the yaw is the target's."""
    captures = straight(50, 0.4)
    yaw = trajectory.draw_yaw(np.random.default_rng(1), 50)
    facing = trajectory.facing_yaw(turned(captures, yaw), captures)
    np.testing.assert_allclose(np.exp(1j * facing), np.exp(1j * yaw), atol=1e-5)


def test_other_lane_speed_and_direction_face_the_same_way_at_the_same_place():
    """A condition in the other lane, twice as fast, driving towards the target."""
    target = turned(straight(41, 0.0), np.linspace(3.0, 4.0, 41))
    other = straight(21, np.pi, spacing=1.0)
    offset = np.eye(4)
    offset[:3, 3] = [-3.0, 20.0, 0.2]
    other = ANCHOR @ offset @ invert_rigid(ANCHOR) @ other
    facing = trajectory.headings(turned(other, trajectory.facing_yaw(target, other)))
    np.testing.assert_allclose(
        np.exp(1j * facing), np.exp(1j * np.linspace(4.0, 3.0, 21)), atol=1e-4
    )


def test_beyond_the_end_the_heading_goes_on_at_the_last_rate():
    rates = np.append(np.zeros(19), 0.02)
    target = turned(straight(21), np.concatenate([[0], np.cumsum(rates)]))
    captures = straight(31)
    facing = trajectory.headings(
        turned(captures, trajectory.facing_yaw(target, captures))
    )
    np.testing.assert_allclose(facing[:20], 0, atol=1e-6)
    np.testing.assert_allclose(facing[20:], 0.02 * np.arange(1, 12), atol=1e-5)


def test_target_standing_at_its_end_or_always_is_no_exception():
    """Frames at a standstill add rotation without length: nothing may blow up."""
    moving = straight(11)
    standing = np.concatenate([moving, np.repeat(moving[-1:], 10, axis=0)])
    yaw = np.concatenate([np.zeros(11), 0.01 * np.arange(1, 11)])
    facing = trajectory.facing_yaw(turned(standing, yaw), straight(16))
    np.testing.assert_allclose(facing[:11], 0, atol=1e-5)
    # Mean spacing is 0.25 m, half of the captures': two frames' rate for each.
    np.testing.assert_allclose(facing[11:], 0.1 + 0.02 * np.arange(1, 6), atol=1e-5)
    still = np.repeat(moving[:1], 8, axis=0)
    assert np.isfinite(trajectory.facing_yaw(still, straight(5))).all()


def test_the_camera_stands_where_and_as_long_as_it_is_told():
    """Two and a half seconds at ten frames are 25 frames more of one pose."""
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 0, 3] = 0.5 * np.arange(5)
    made = trajectory.insert_stops(poses, 0.5, 10.0, [(1.0, 2.5), (2.0, 0.2)])
    places = [*[0.0, 0.5], *[1.0] * 26, 1.5, *[2.0] * 3]
    np.testing.assert_array_equal(made[:, 0, 3], places)
    np.testing.assert_array_equal(trajectory.insert_stops(poses, 0.5, 10.0, []), poses)
    for stop in ((2.1, 1.0), (-0.1, 1.0), (1.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="on the path, which is 2.0 m long"):
            trajectory.insert_stops(poses, 0.5, 10.0, [stop])
