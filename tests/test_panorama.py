"""Crops of panoramas: where rays go, seams, poles, and which tiles they touch."""

import numpy as np
import pytest

from cityrag_jax.geo import panorama
from cityrag_jax.geo.trajectory import yaw_rotation

VIEW = {"height": 48, "width": 80, "fov_rad": np.deg2rad(65.0)}


def sphere(height: int = 256) -> np.ndarray:
    """Paint each pixel with its own direction (x, y, z) in the panorama frame."""
    longitude = 2 * np.pi * (np.arange(2 * height) + 0.5) / (2 * height) - np.pi
    depression = np.pi * (np.arange(height) + 0.5) / height - np.pi / 2
    directions = np.empty((height, 2 * height, 3))
    directions[..., 0] = np.cos(depression)[:, None] * np.sin(longitude)[None, :]
    directions[..., 1] = np.sin(depression)[:, None]
    directions[..., 2] = np.cos(depression)[:, None] * np.cos(longitude)[None, :]
    return directions


def pitch_rotation(pitch):
    sine, cosine = np.sin(pitch), np.cos(pitch)
    return np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])


@pytest.mark.parametrize("pitch_deg", [0, 25, -60, 90, -90])
@pytest.mark.parametrize("yaw_deg", [0, 37, 180, 179.9, -90, 725])
def test_crop_sees_the_direction_of_its_rays(yaw_deg, pitch_deg):
    """On a sphere painted with directions, a crop must return its own rays.

    Bilinear interpolation of a sphere 256 rows high is off by up to
    (pi / 256)^2 / 4 = 4e-5 across, and twice that at the poles.
    """
    yaw, pitch = np.deg2rad(yaw_deg), np.deg2rad(pitch_deg)
    crop = panorama.crop_panorama(sphere(), yaw, pitch_rad=pitch, **VIEW)
    rays = panorama.crop_rays(**VIEW)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    rotation = yaw_rotation(np.array(yaw))[:3, :3] @ pitch_rotation(pitch)
    np.testing.assert_allclose(crop, rays @ rotation.T, atol=1.5e-4)


def test_yaw_turns_right_and_pitch_up():
    """Right of forward is +x, up is -y, as in the module's conventions."""
    right = panorama.crop_panorama(sphere(), np.pi / 2, **VIEW).mean((0, 1))
    up = panorama.crop_panorama(sphere(), 0.0, pitch_rad=0.5, **VIEW).mean((0, 1))
    assert right[0] > 0.8 and abs(right[2]) < 1e-6
    assert up[1] < -0.3


@pytest.mark.parametrize("turns", [-1, 1, 2])
def test_yaw_of_360_returns_the_same_crop(turns, rng):
    picture = rng.uniform(0, 255, (64, 128, 3))
    first = panorama.crop_panorama(picture, 0.3, **VIEW)
    again = panorama.crop_panorama(picture, 0.3 + 2 * np.pi * turns, **VIEW)
    np.testing.assert_allclose(first, again, atol=1e-9)


def test_yaw_by_whole_columns_is_a_roll(rng):
    picture = rng.uniform(0, 255, (64, 128, 3))
    for columns in (1, 40, 100):
        yaw = 2 * np.pi * columns / 128
        crop = panorama.crop_panorama(picture, yaw, **VIEW)
        rolled = panorama.crop_panorama(np.roll(picture, -columns, 1), 0.0, **VIEW)
        np.testing.assert_allclose(crop, rolled, atol=1e-9)


def test_centre_column_of_the_panorama_is_forward():
    columns, rows = panorama.sampling_map(64, 0.0, height=1, width=1, fov_rad=1.0)
    assert columns[0, 0] == pytest.approx(63.5) and rows[0, 0] == pytest.approx(31.5)


def test_field_of_view_is_horizontal_between_outer_pixel_edges():
    columns, _ = panorama.sampling_map(
        512, 0.0, height=1, width=1001, fov_rad=np.pi / 2
    )
    step = columns[0, 1] - columns[0, 0]
    assert columns[0, -1] - columns[0, 0] + step == pytest.approx(256, abs=1e-3)


@pytest.mark.parametrize("height", [128, 384, 512])
def test_touched_tiles_are_those_of_the_sampled_pixels(height, rng):
    """Oracle: mark the tile of each of the four neighbours of each sample."""
    row_edges, column_edges = panorama.tile_edges(height)
    assert row_edges[0] == 0 and row_edges[-1] == height
    assert column_edges[-1] == 2 * height
    for _ in range(60):
        yaw, pitch = rng.uniform(-7, 7), rng.choice([0, 0, rng.uniform(-1.5, 1.5)])
        fov = rng.uniform(0.3, 1.9)
        view = {"height": 20, "width": 32, "fov_rad": fov, "pitch_rad": float(pitch)}
        columns, rows = panorama.sampling_map(height, yaw, **view)
        wanted = set()
        for dr in (0, 1):
            for dc in (0, 1):
                r = np.clip(np.floor(rows).astype(int) + dr, 0, height - 1)
                c = (np.floor(columns).astype(int) + dc) % (2 * height)
                r = np.searchsorted(row_edges, r, "right") - 1
                c = np.searchsorted(column_edges, c, "right") - 1
                wanted |= set(zip(r.flat, c.flat, strict=True))
        window = panorama.touched_tiles(height, yaw, **view)
        given = {
            (r, (window.column_start + k) % 8)
            for r in range(window.row_start, window.row_stop)
            for k in range(window.column_count)
        }
        assert wanted <= given
        if not window.whole:
            assert {c for _, c in wanted} == {c for _, c in given}
            assert {r for r, _ in wanted} == {r for r, _ in given}


def test_level_65_degree_crop_touches_two_or_three_tiles():
    counts = []
    for yaw in np.linspace(0, 2 * np.pi, 200):
        window = panorama.touched_tiles(
            2048, yaw, height=480, width=832, fov_rad=np.deg2rad(65.0)
        )
        counts.append((window.row_stop - window.row_start) * window.column_count)
    assert max(counts) == 3 and 2.3 < np.mean(counts) < 2.6


def test_impossible_pictures_and_angles_are_refused():
    with pytest.raises(ValueError, match="100x64 cannot be cut"):
        panorama.check_panorama_shape(64, 100)
    with pytest.raises(ValueError, match="180.0 degrees"):
        panorama.crop_rays(4, 4, np.pi)
