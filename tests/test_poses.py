"""Poses of instruments and of other programs, against geometry done by hand."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cityrag_jax.geo import poses
from cityrag_jax.geo.ecef import ecef_from_enu, ecef_from_geodetic, invert_rigid
from cityrag_jax.geo.trajectory import headings, level_poses

PLACE = 48.137, 11.575, 520.0


def at(heading, pitch=0.0, roll=0.0):
    """Give enu_from_camera rotation of one camera."""
    latitude, longitude, height = (np.array([v]) for v in PLACE)
    made = poses.poses_from_geodetic(
        latitude, longitude, height, np.array([heading]), pitch, roll
    )
    np.testing.assert_allclose(made[0, :3, 3], ecef_from_geodetic(*PLACE))
    return ecef_from_enu(*PLACE)[:3, :3].T @ made[0, :3, :3]


def test_attitudes_point_where_they_say():
    """Columns are the camera's right, down and forward in east, north, up."""
    np.testing.assert_allclose(at(0.0), [[1, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-9)
    np.testing.assert_allclose(at(90.0)[:, 2], [1, 0, 0], atol=1e-9)
    up30 = at(90.0, pitch=30.0)
    np.testing.assert_allclose(up30[:, 2], [np.sqrt(3) / 2, 0, 0.5], atol=1e-9)
    np.testing.assert_allclose(up30[:, 0], [0, -1, 0], atol=1e-9)
    # Rolled by 30 the right side (east, when looking north) is down.
    np.testing.assert_allclose(
        at(0.0, roll=30.0)[:, 0], [np.sqrt(3) / 2, 0, -0.5], atol=1e-9
    )


def test_attitudes_are_the_aeronautic_ones(rng):
    """Yaw, pitch and roll of a body with x forward, y right, z down in NED."""
    ned_from_enu = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1.0]])
    for heading, pitch, roll in rng.uniform(-80, 80, (20, 3)):
        body = Rotation.from_euler("ZYX", [heading, pitch, roll], degrees=True)
        axes = poses.CONVENTIONS["x forward, y right, z down"]
        wanted = ned_from_enu.T @ body.as_matrix() @ axes
        np.testing.assert_allclose(at(heading, pitch, roll), wanted, atol=1e-9)


def test_level_poses_are_the_special_case(rng):
    heading = rng.uniform(-np.pi, np.pi, 9)
    latitude, longitude = np.full(9, PLACE[0]), np.full(9, PLACE[1])
    made = poses.poses_from_geodetic(
        latitude, longitude, np.full(9, PLACE[2]), np.rad2deg(heading)
    )
    level = ecef_from_enu(*PLACE) @ level_poses(np.zeros((9, 3)), heading)
    np.testing.assert_allclose(made, level, atol=1e-6)
    np.testing.assert_allclose(headings(made), heading, atol=1e-9)


def drive(num=40):
    places = np.zeros((num, 3))
    places[:, 0] = 0.5 * np.arange(num)
    return ecef_from_enu(*PLACE) @ level_poses(places, np.full(num, np.pi / 2))


@pytest.mark.parametrize("convention", list(poses.CONVENTIONS)[1:])
def test_other_axes_are_recognised_and_turned(convention):
    right = drive()
    wrong = right.copy()
    wrong[:, :3, :3] = right[:, :3, :3] @ poses.CONVENTIONS[convention].T
    assert poses.share_upright(right) == 1.0
    if poses.share_upright(wrong) < 0.95:
        assert convention in poses.guess_axes(wrong)[0]
    np.testing.assert_allclose(poses.to_opencv(wrong, convention), right)


def test_inverted_poses_are_recognised():
    guesses = poses.guess_axes(invert_rigid(drive()))
    assert "camera-from-world" in guesses[0]


def test_unknown_axes_are_refused():
    with pytest.raises(ValueError, match="No axes are called 'nerf'"):
        poses.to_opencv(drive(), "nerf")
