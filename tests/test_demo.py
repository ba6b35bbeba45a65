"""The demo's parts; `test_wheel.py` runs all of it."""

import json

import numpy as np
import pytest

from cityrag_jax.demo import PATH_M, PLAN, draw_path, plan_city, score_along
from cityrag_jax.geo.ecef import ecef_from_geodetic
from cityrag_jax.toy import drives as toy


def test_a_long_path_goes_round_a_block(tmp_path):
    """A thousand frames of 0.375 m, in a neighbourhood 44 m wide."""
    plan = plan_city(375.0)
    draw_path(plan, 2, tmp_path / "path.geojson", 375.0)
    path = json.loads((tmp_path / "path.geojson").read_text())
    longitude, latitude, height = np.array(path["coordinates"]).T
    places = ecef_from_geodetic(latitude, longitude, height)
    along_m = np.linalg.norm(np.diff(places, axis=0), axis=1).sum()
    assert along_m == pytest.approx(375, rel=0.02)  # corners are cut between points
    assert np.linalg.norm(places - places[0], axis=1).max() < 65
    assert plan_city(PATH_M) == toy.city("honolulu", **PLAN)


def test_a_long_video_is_scored_stretch_by_stretch():
    """Off by 1 of 255 it has 48.13 dB, by 10 it has 28.13; frame 0 is given."""
    truth = np.full((10, 4, 6, 3), 100, np.uint8)
    video = truth + np.repeat([9, 1, 1, 10, 10, 10, 10, 10, 1, 1], 72).reshape(
        truth.shape
    ).astype(np.uint8)
    (row,) = score_along({"made": video}, truth, stretch=4).values()
    assert list(row) == ["to frame 4", "to frame 8", "to frame 10"]
    one, ten = 20 * np.log10(255), 20 * np.log10(25.5)
    wanted = [(2 * one + ten) / 3, ten, one]
    np.testing.assert_allclose(list(row.values()), wanted, rtol=1e-6)
