"""Poses as other programs write them: each format by its own convention, one truth."""

import json

import numpy as np
import pytest
import synthetic_city as synthetic
from scipy.spatial.transform import Rotation

from cityrag_jax.data.paths import read_path
from cityrag_jax.geo.camera_files import parse_cameras, place_cameras
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef, invert_rigid
from cityrag_jax.geo.path_files import format_tum
from cityrag_jax.geo.pose_files import parse_placements
from cityrag_jax.geo.poses import CONVENTIONS
from cityrag_jax.geo.trajectory import headings, relative_poses

ANCHOR = synthetic.ANCHOR
ENU = synthetic.line([5.0, -3.0, 2.0], 30.0, 12)
ECEF = ecef_from_enu(*ANCHOR) @ ENU


def tum(poses):
    xyzw = Rotation.from_matrix(poses[:, :3, :3]).as_quat()
    rows = np.column_stack([1.7e9 + np.arange(len(poses)), poses[:, :3, 3], xyzw])
    return "# time x y z qx qy qz qw\n" + "\n".join(
        " ".join(f"{x:.15g}" for x in row) for row in rows
    )


def kitti(poses):
    return "\n".join(" ".join(f"{x:.15g}" for x in p[:3].flat) for p in poses)


def colmap(poses, points="1.5 2.5 -1 3.5 4.5 7\n"):
    """Camera-from-world, the real number of a quaternion first, points behind."""
    lines = ["# Image list with two lines of data per image:"]
    for k, pose in enumerate(invert_rigid(poses), 1):
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
        row = [w, x, y, z, *pose[:3, 3]]
        numbers = " ".join(f"{value:.15g}" for value in row)
        lines.append(f"{k} {numbers} 1 drive/a photo {k}.jpg\n{points}".rstrip("\n"))
    return "\n".join(lines) + "\n"


def nuscenes(poses):
    """Of the vehicle, which has x forward, y left, z up."""
    items = []
    for k, pose in enumerate(poses):
        ego = pose[:3, :3] @ CONVENTIONS["x forward, y left, z up"].T
        x, y, z, w = Rotation.from_matrix(ego).as_quat().tolist()
        items.append(
            {
                "token": f"{k:032x}",
                "timestamp": int(1.7e15 + 1e6 * k),
                "rotation": [w, x, y, z],
                "translation": pose[:3, 3].tolist(),
            }
        )
    return json.dumps(items)


FORMATS = {
    "a.tum": tum,
    "00.txt": kitti,
    "images.txt": colmap,
    "ego_pose.json": nuscenes,
}


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cameras") / "city"
    return synthetic.build(folder, [synthetic.line([0, -20, 2], 0, 9)], height=64)


@pytest.mark.parametrize("poses", [ENU, ECEF], ids=["local", "ecef"])
@pytest.mark.parametrize("name", [*FORMATS, "poses.npy"])
def test_every_format_gives_the_same_path(name, poses, city, tmp_path):
    """15 digits of ECEF metres and of quaternions leave a millionth."""
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, poses[:, :3])
    else:
        path.write_text(FORMATS[name](poses))
    np.testing.assert_allclose(read_path(path, city, 0.5), ECEF, rtol=0, atol=1e-6)


def test_what_a_video_was_asked_for_is_a_path_again(city, tmp_path):
    """Its poses.tum stands in the first camera's frame, and says where that is."""
    text = format_tum(relative_poses(ECEF), 10.0, ECEF[0])
    (tmp_path / "poses.tum").write_text(text)
    again = read_path(tmp_path / "poses.tum", city, 0.5)
    # Relative poses are float32, written with nine digits: six metres to a micron.
    np.testing.assert_allclose(again, ECEF, rtol=0, atol=2e-6)


def test_pictures_are_placed_by_colmaps_names():
    told = parse_placements(colmap(ENU, points=""), "images.txt", ANCHOR)
    assert told.names[1] == "drive/a photo 2.jpg"
    places = np.stack([told.latitude_deg, told.longitude_deg, told.height_m])
    np.testing.assert_allclose(places, geodetic_from_ecef(ECEF[:, :3, 3]), atol=1e-6)
    np.testing.assert_allclose(told.heading_deg, 30.0, atol=1e-4)
    assert np.abs([told.pitch_deg, told.roll_deg]).max() < 1e-4
    by_time = parse_placements(nuscenes(ENU), "ego_pose.json", ANCHOR)
    np.testing.assert_allclose(by_time.time_s, 1.7e9 + np.arange(12))
    with pytest.raises(ValueError, match="local metres, up to .* --anchor=LATITUDE"):
        parse_placements(colmap(ENU), "images.txt")
    with pytest.raises(ValueError, match="neither names nor times"):
        parse_placements(kitti(ENU), "00.txt", ANCHOR)


def test_wrong_axes_and_frames_are_said():
    """KITTI counts from its first camera; a y-up camera is a renderer's."""
    first = parse_cameras(kitti(relative_poses(ECEF).astype(float)), "00.txt")
    with pytest.raises(ValueError, match="world whose y axis is down, such as the fir"):
        place_cameras(first, ANCHOR, "00.txt")
    for axes in list(CONVENTIONS)[1:]:
        turned = ENU.copy()
        turned[:, :3, :3] = ENU[:, :3, :3] @ CONVENTIONS[axes].T
        wrong = parse_cameras(tum(turned), "a.tum")
        if "z down" in axes or "z up" in axes or "y up" in axes:
            with pytest.raises(
                ValueError, match=f"upright. Perhaps camera axes are {axes}"
            ):
                place_cameras(wrong, ANCHOR, "a.tum")
    inverse = parse_cameras(tum(invert_rigid(ECEF)), "a.tum")
    with pytest.raises(ValueError, match="upright|Perhaps"):
        place_cameras(inverse, ANCHOR, "a.tum")
    right = place_cameras(parse_cameras(tum(ENU), "a.tum"), ANCHOR, "a.tum")
    np.testing.assert_allclose(np.rad2deg(headings(right)), 30.0, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0 0 0 0 0 0 1\n1 0 0 0 0 0 0\n", "pose 2 is .* not 8 numbers"),
        ("0 0 0 0 1 0 0 1\n", "quaternion of pose 1 has length 1.41"),
        (
            "2 0 0 0 0 2 0 0 0 0 2 0\n" * 2,
            "rotation of pose 1 is none .* without scale",
        ),
        ("0 nan 0 0 0 0 0 1\n", "pose 1 is not all numbers"),
    ],
)
def test_what_is_no_pose_is_named(text, message):
    with pytest.raises(ValueError, match=f"a.txt: .*{message}|{message}"):
        place_cameras(parse_cameras(text, "a.txt"), ANCHOR, "a.txt")


def test_other_paths_are_left_to_others(city, tmp_path):
    assert parse_cameras("start 48.1,11.5; forward 30", "walk.txt") is None
    assert parse_cameras('{"type": "LineString"}', "walk.json") is None
    assert parse_cameras("48.1,11.5\n48.2,11.6\n", "walk.csv") is None
    (tmp_path / "a.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.npy is no array of numbers"):
        read_path(tmp_path / "a.npy", city, 0.5)
    np.save(tmp_path / "a.npy", np.zeros((3, 7)))
    with pytest.raises(ValueError, match=r"holds \(3, 7\); poses are \[N, 4, 4\]"):
        read_path(tmp_path / "a.npy", city, 0.5)
