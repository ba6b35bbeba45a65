"""Camera scripts: words to poses, against places and headings done by hand."""

import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.data.paths import read_path
from cityrag_jax.geo.ecef import ecef_from_enu, ecef_from_geodetic, geodetic_from_ecef
from cityrag_jax.geo.script import look_around, parse_script
from cityrag_jax.geo.trajectory import headings

START = "start 48.137,11.575 0"
AXES = ecef_from_enu(48.137, 11.575, 0.0)


def east_north(rows):
    places = ecef_from_geodetic(rows[:, 0], rows[:, 1], np.zeros(len(rows)))
    return ((places - AXES[:3, 3]) @ AXES[:3, :3])[:, :2]


def test_corners_stand_where_the_words_lead():
    words = f"{START}  # at the market\nforward 30; left 90;forward 40.5\nRight 45"
    script = parse_script(words + "\nforward 10")
    wanted = [[0, 0], [0, 30], [-40.5, 30]]
    wanted.append([-40.5 - 10 / np.sqrt(2), 30 + 10 / np.sqrt(2)])
    np.testing.assert_allclose(east_north(script.corners), wanted, atol=1e-3)
    assert script.looks.shape == (0, 3)


def test_looks_and_stops_come_after_what_was_walked():
    script = parse_script(f"{START}; forward 30; stop 2; forward 5; look -90 over 3")
    assert script.looks.tolist() == [[30, 2, 0], [35, 3, -90]]


def test_the_camera_stands_while_it_turns_and_keeps_its_angle():
    city_poses = AXES @ synthetic.line([0, 0, 2], 0, 41, 0.5)
    looks = np.array([[5.0, 2.0, 90.0], [15.0, 1.0, 0.0]])
    poses = look_around(city_poses, looks, 0.5, 10.0)
    assert len(poses) == 41 + 20 + 10
    moved_m = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    standing = np.flatnonzero(moved_m < 1e-6)
    assert standing.tolist() == [*range(10, 30), *range(50, 60)]
    turned = np.rad2deg(headings(poses))
    np.testing.assert_allclose(turned[:11], 0, atol=1e-3)
    np.testing.assert_allclose(np.diff(turned[10:31]), 4.5, atol=1e-6)
    np.testing.assert_allclose(turned[30:], 90, atol=1e-3)


def test_a_script_is_a_path_file(tmp_path):
    drives = [synthetic.line([0, -5, 2], 0, 80)]
    city = synthetic.build(tmp_path / "city", drives, height=64)
    latitude, longitude, _ = synthetic.ANCHOR
    file = tmp_path / "walk.txt"
    file.write_text(f"start {latitude},{longitude} 0\nforward 20\nlook 180 over 9\n")
    poses = read_path(file, city, 0.5)
    assert len(poses) == 41 + 90
    heights = geodetic_from_ecef(poses[:, :3, 3])[2]
    np.testing.assert_allclose(heights, synthetic.ANCHOR[2] + 2, atol=1e-3)
    assert abs(np.rad2deg(headings(poses))[-1]) == pytest.approx(180, abs=1e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "begins with nothing; write a first line 'start"),
        ("forward 3", "begins with 'forward 3'"),
        ("start 98,11 0; forward 3", "starts at latitude 98.0"),
        (f"{START}; jump 3", "'jump 3' is not understood"),
        (f"{START}; look 90", "'look 90' is not understood"),
        (f"{START}; forward 3 over 2", "'forward 3 over 2' is not understood"),
        (f"{START}; forward -3", "'forward -3' must be more than 0"),
        (f"{START}; left 90", "goes nowhere"),
    ],
)
def test_words_that_are_none_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_script(text)
