"""Geodetic, ECEF and ENU coordinates against pyproj and their own definitions."""

import numpy as np
import pyproj
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cityrag_jax.geo import ecef

MICROMETRE = 1e-6
TO_ECEF = pyproj.Transformer.from_crs("EPSG:4979", "EPSG:4978", always_xy=True)

angles = st.tuples(
    st.floats(-90, 90), st.floats(-180, 180), st.floats(-10_000, 100_000)
)


@given(angles)
def test_any_place_equals_pyproj_to_a_micrometre_and_comes_back(place):
    latitude, longitude, height = place
    ours = ecef.ecef_from_geodetic(latitude, longitude, height)
    theirs = np.array(TO_ECEF.transform(longitude, latitude, height))
    assert np.abs(ours - theirs).max() < MICROMETRE
    back = ecef.ecef_from_geodetic(*(float(v) for v in ecef.geodetic_from_ecef(ours)))
    assert np.abs(back - ours).max() < MICROMETRE


@pytest.mark.parametrize("latitude", [-90.0, -89.9999999, 0.0, 45.0, 89.9999999, 90.0])
@pytest.mark.parametrize("longitude", [-180.0, -179.9999999, 0.0, 90.0, 180.0])
def test_poles_and_date_line_are_no_exceptions(latitude, longitude):
    position = ecef.ecef_from_geodetic(latitude, longitude, 12.5)
    theirs = np.array(TO_ECEF.transform(longitude, latitude, 12.5))
    assert np.abs(position - theirs).max() < MICROMETRE
    back = ecef.geodetic_from_ecef(position)
    assert abs(back[0] - latitude) < 1e-11 and abs(back[2] - 12.5) < MICROMETRE


def test_arrays_give_what_single_places_give(rng):
    latitude, longitude = rng.uniform(-90, 90, 50), rng.uniform(-180, 180, 50)
    height = rng.uniform(-100, 9000, 50)
    together = ecef.ecef_from_geodetic(latitude, longitude, height)
    for k in range(50):
        one = ecef.ecef_from_geodetic(latitude[k], longitude[k], height[k])
        np.testing.assert_array_equal(together[k], one)
    back = np.stack(ecef.geodetic_from_ecef(together))
    np.testing.assert_allclose(back[:2], [latitude, longitude], atol=1e-11)
    np.testing.assert_allclose(back[2], height, atol=1e-6)


def test_enu_axes_are_the_derivatives_of_latitude_longitude_and_height(rng):
    """East, north and up are where a small step of each coordinate leads."""
    for _ in range(20):
        place = np.array([rng.uniform(-89, 89), rng.uniform(-180, 180), 50.0])
        transform = ecef.ecef_from_enu(*place)
        np.testing.assert_allclose(np.linalg.det(transform), 1, atol=1e-12)
        for axis, step in enumerate(np.array([[0, 1e-5, 0], [1e-5, 0, 0], [0, 0, 1]])):
            moved = ecef.ecef_from_geodetic(*(place + step))
            moved = moved - ecef.ecef_from_geodetic(*(place - step))
            np.testing.assert_allclose(
                moved / np.linalg.norm(moved), transform[:3, axis], atol=1e-8
            )


def test_inverse_undoes_a_rigid_transform(rng):
    transform = ecef.ecef_from_enu(48.1, 11.5, 500.0)
    np.testing.assert_allclose(
        ecef.invert_rigid(transform) @ transform, np.eye(4), atol=1e-8
    )


@pytest.mark.parametrize("highest_m, within_m", [(1500, 1e-3), (9000, 0.04)])
def test_dropping_to_the_ellipsoid_is_height_zero(rng, highest_m, within_m):
    """The gradient's direction is off by the height's square over the radius."""
    latitude, longitude = rng.uniform(-90, 90, 500), rng.uniform(-180, 180, 500)
    height = rng.uniform(-500, highest_m, 500)
    below, found = ecef.drop_to_ellipsoid(
        ecef.ecef_from_geodetic(latitude, longitude, height)
    )
    truth = ecef.ecef_from_geodetic(latitude, longitude, np.zeros(500))
    np.testing.assert_allclose(below, truth, atol=within_m, rtol=0)
    np.testing.assert_allclose(found, height, atol=within_m, rtol=0)
