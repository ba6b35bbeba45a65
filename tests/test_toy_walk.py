"""Days that no drive knew, and walks around corners."""

import dataclasses

import numpy as np

from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.toy.drives import city, drives
from cityrag_jax.toy.scene import draw_scene
from cityrag_jax.toy.walk import CLEAR_DAY, draw_day, film, sharpest_corner

CITY = city("paris", neighbourhoods=2, blocks=2, block_m=40.0, supersample=1)


def test_the_clear_day_is_clear_and_others_are_not():
    """The haze of other weathers is thicker than any clear day's 0.0012 * 1.25 / m."""
    place = (CITY.latitude_deg, CITY.longitude_deg)
    clear = draw_scene(np.random.default_rng(CLEAR_DAY), "clear", *place)
    for field in dataclasses.fields(clear):
        drawn = getattr(draw_day(CITY, CLEAR_DAY), field.name)
        np.testing.assert_array_equal(drawn, getattr(clear, field.name))
    others = [draw_day(CITY, seed) for seed in range(40) if seed != CLEAR_DAY]
    assert clear.haze_per_m < 0.0016 <= min(day.haze_per_m for day in others)
    # Of five weathers, each with another light.
    assert len({day.lamps.tobytes() + day.wet.tobytes() for day in others}) >= 4
    assert len({float(day.start_time_s) for day in others}) == len(others)


def test_a_day_films_the_same_street_in_its_own_light():
    drive = drives(CITY)[0]
    anchor = ecef_from_enu(CITY.latitude_deg, CITY.longitude_deg, CITY.height_m)
    poses = anchor @ drive.enu_from_camera[:3]
    one, again, other = (film(CITY, seed, poses, 32, 48, 65.0) for seed in (5, 5, 6))
    assert one.shape == (3, 32, 48, 3)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one.astype(int) - other).mean() > 5


def test_the_sharpest_corner_of_a_walk_north_then_east_is_a_right_angle():
    """Of 60 m: 30 north, 30 east. The walk stays on it, in steps of 2 m."""
    along = np.arange(0.0, 60.5, 0.5)
    drive = drives(CITY)[0]
    poses = np.broadcast_to(np.eye(4), (len(along), 4, 4)).copy()
    poses[:, 0, 3] = np.maximum(along - 30, 0)
    poses[:, 1, 3] = np.minimum(along, 30)
    forward = np.where((along > 30)[:, None], [1.0, 0, 0], [0, 1.0, 0])
    poses[:, :3, 2] = forward
    turn, places = sharpest_corner(
        dataclasses.replace(drive, enu_from_camera=poses, time_s=along), 24.0
    )
    np.testing.assert_allclose(turn, np.pi / 2)
    assert len(places) == 13
    on_street = np.minimum(np.abs(places[:, 0]), np.abs(places[:, 1] - 30))
    np.testing.assert_allclose(on_street, 0, atol=1e-9)
    assert places[0, 1] < 30 and places[-1, 0] > 0
