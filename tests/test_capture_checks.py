"""What real captures get wrong is refused, with the capture and the cure."""

import dataclasses

import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.data.captures import check_captures
from cityrag_jax.geo.ecef import ecef_from_geodetic, geodetic_from_ecef, invert_rigid
from cityrag_jax.geo.poses import CONVENTIONS


@pytest.fixture(scope="module")
def right():
    """Two drives that everything is well with."""
    drives = [synthetic.line([0, 0, 2], 20, 60), synthetic.line([3, 60, 2], 200, 60)]
    return synthetic.columns(drives)


def refuse(captures, message, **changes):
    with pytest.raises(ValueError, match=message):
        check_captures(
            dataclasses.replace(captures, **changes), synthetic.header(), "x.npz"
        )


def test_what_is_right_is_taken(right):
    check_captures(right, synthetic.header(), "x.npz")


def test_inverted_poses_are_told_by_their_axes_or_their_place(right):
    """Inverses lie as high as the right ones, in another part of the world."""
    refuse(
        right, "km from the city's anchor .*camera-from-world: invert",
        ecef_from_camera=invert_rigid(right.ecef_from_camera),
    )  # fmt: skip


@pytest.mark.parametrize("convention", list(CONVENTIONS)[1:])
def test_other_camera_axes_are_named(right, convention):
    poses = right.ecef_from_camera.copy()
    poses[:, :3, :3] = poses[:, :3, :3] @ CONVENTIONS[convention].T
    refuse(right, f"stand upright.*perhaps.*{convention}", ecef_from_camera=poses)


def test_a_few_tilted_cameras_are_a_hill(right):
    poses = right.ecef_from_camera.copy()
    poses[:5, :3, :3] = poses[:5, :3, :3] @ CONVENTIONS["x right, y forward, z up"].T
    check_captures(
        dataclasses.replace(right, ecef_from_camera=poses), synthetic.header(), "x"
    )


def test_positions_rounded_to_float32_are_named(right):
    poses = right.ecef_from_camera.copy()
    poses[:, :3, 3] = poses[:, :3, 3].astype(np.float32)
    refuse(right, "all positions are float32 numbers", ecef_from_camera=poses)


def test_times_are_unix_seconds(right):
    milliseconds = right.time_s * 1000
    refuse(right, "milliseconds: divide by 1e.03", time_s=milliseconds)
    refuse(right, "taken at 0.0 s, 60 captures outside",
           time_s=np.where(right.drive == 0, 0.0, right.time_s))  # fmt: skip
    broken = right.time_s.copy()
    broken[7] = np.nan
    refuse(right, "capture 7 was taken at nan s, 1 captures outside", time_s=broken)


def test_a_leap_within_a_drive_is_refused_and_between_drives_is_not(right):
    poses = right.ecef_from_camera.copy()
    poses[30:60, :3, 3] += 2000 * poses[0, :3, 2]
    refuse(right, "capture 30 is 200[01] m from capture 29", ecef_from_camera=poses)
    poses[:30, :3, 3] += 2000 * poses[0, :3, 2]
    check_captures(
        dataclasses.replace(right, ecef_from_camera=poses), synthetic.header(), "x"
    )


def test_swapped_coordinates_and_a_wrong_anchor_are_told_apart(right):
    latitude, longitude, height = geodetic_from_ecef(right.ecef_from_camera[:, :3, 3])
    poses = right.ecef_from_camera.copy()
    poses[:, :3, 3] = ecef_from_geodetic(longitude, latitude, height)
    refuse(right, "latitude and longitude are swapped", ecef_from_camera=poses)
    poses[:, :3, 3] = ecef_from_geodetic(latitude + 5, longitude, height)
    refuse(right, "correct the pose, or the anchor", ecef_from_camera=poses)
