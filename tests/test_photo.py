"""A photo's own pose: its view in the model's terms, and the turn that follows."""

import numpy as np
import pytest
import synthetic_city as synthetic
import tagged_pictures as tagged

from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.photo import (
    PhotoPose,
    level_photo,
    parse_photo_pose,
    start_at_photo,
)
from cityrag_jax.geo.trajectory import headings
from cityrag_jax.request import Order, read_photo_pose

LATITUDE, LONGITUDE, HEIGHT = synthetic.ANCHOR


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photo") / "city"
    return synthetic.build(folder, [synthetic.line([0, 0, 2], 0, 2)], height=512)


def shot(city, height, width, fov_deg, pitch_deg=0.0):
    view = dict(height=height, width=width, fov_deg=fov_deg, pitch_deg=pitch_deg)
    return city.crops(np.array([0]), np.array([0.3]), **view)[0]


@pytest.mark.parametrize("pitch", [0.0, 8.0, -8.0])
def test_a_photo_of_another_lens_and_pitch_becomes_the_level_view(city, pitch):
    """Every pixel shows its direction, so the views agree where they look."""
    photo = shot(city, 300, 400, 95.0, pitch)
    pose = PhotoPose(LATITUDE, LONGITUDE, 0.0, pitch, 95.0)
    levelled = level_photo(photo, pose, 48, 80, 65.0)
    wanted = shot(city, 48, 80, 65.0)
    # Two rounds of 8-bit interpolation and JPEG.
    assert np.abs(levelled.astype(int) - wanted).max() <= 3


def test_a_photo_of_the_right_view_is_only_resampled(city):
    photo = shot(city, 96, 160, 65.0)
    pose = PhotoPose(LATITUDE, LONGITUDE, 0.0)
    levelled = level_photo(photo, pose, 96, 160, 65.0)
    assert np.abs(levelled.astype(int) - photo).max() <= 1


def test_a_photo_that_shows_too_little_is_refused(city):
    photo = shot(city, 96, 160, 65.0)
    narrow = PhotoPose(LATITUDE, LONGITUDE, 0.0, 0.0, 50.0)
    with pytest.raises(ValueError, match=r"shows 50 x 31 degrees at pitch 0, not all"):
        level_photo(photo, narrow, 96, 160, 65.0)
    with pytest.raises(ValueError, match="at pitch 20"):
        level_photo(photo, PhotoPose(0.0, 0.0, 0.0, 20.0), 96, 160, 65.0)


def test_the_path_begins_as_the_photo_looks_and_turns_two_degrees_a_frame():
    path = ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line([0, 0, 2], 10, 90)
    for heading, turned in ((90.0, 80), (350.0, -20), (200.0, -170)):
        poses = start_at_photo(path, PhotoPose(LATITUDE, LONGITUDE, heading))
        seen = np.rad2deg(np.unwrap(headings(poses)))
        assert (seen[0] - heading) % 360 == pytest.approx(0, abs=1e-6) or (
            seen[0] - heading
        ) % 360 == pytest.approx(360, abs=1e-6)
        assert np.abs(np.diff(seen)).max() == pytest.approx(2, abs=1e-5)
        assert seen[0] - seen[-1] == pytest.approx(turned, abs=1e-3)
        np.testing.assert_allclose(poses[:, :3, 3], path[:, :3, 3])


def test_a_photo_of_another_place_is_refused():
    path = ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line([0, 100, 2], 0, 9)
    with pytest.raises(ValueError, match="taken 100 m from the path's start"):
        start_at_photo(path, PhotoPose(LATITUDE, LONGITUDE, 0.0))


def test_a_pose_is_three_to_five_numbers():
    assert parse_photo_pose("48.1,11.5,20") == PhotoPose(48.1, 11.5, 20.0)
    assert parse_photo_pose("48.1, 11.5, -20, 5, 70").fov_deg == 70.0
    for text in ("48,11", "48,11,x", "98,11,0", "48,11,0,0,1", "1,2,3,4,5,6"):
        with pytest.raises(ValueError, match="write latitude,longitude,heading"):
            parse_photo_pose(text)


def test_a_photo_tells_its_own_pose(tmp_path):
    """A phone's picture: place, direction, and a lens of 24 mm on 36."""
    picture = np.zeros((30, 40, 3), np.uint8)
    place, path = (LATITUDE, LONGITUDE), tmp_path / "a.jpg"
    tagged.save(path, picture, place=place, heading_deg=77.0, focal_mm=24)
    pose = read_photo_pose(Order(str(path), "walk.csv", photo_pose="exif"))
    assert pose.latitude_deg == pytest.approx(LATITUDE, abs=1e-8)
    assert (pose.heading_deg, pose.pitch_deg) == (77.0, 0.0)
    # The diagonal is 43.27 mm on film, four fifths of it across.
    across = 2 * np.rad2deg(np.arctan(0.8 * 43.2666 / 2 / 24))
    assert pose.fov_deg == pytest.approx(across, abs=1e-3)
    given = read_photo_pose(Order(str(path), "walk.csv", photo_pose="1,2,3"))
    assert given == PhotoPose(1.0, 2.0, 3.0)
    tagged.save(path, picture, place=place)
    with pytest.raises(
        ValueError, match="does not tell its heading_deg .* --photo-pose"
    ):
        read_photo_pose(Order(str(path), "walk.csv", photo_pose="exif"))
