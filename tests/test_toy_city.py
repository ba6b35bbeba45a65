"""The toy city: the same bytes always, one truth from every camera, streets covered."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial import cKDTree

from cityrag_jax.toy import render
from cityrag_jax.toy.drives import (
    CAMERA_HEIGHT_M,
    city,
    drives,
    routes,
    streets,
)
from cityrag_jax.toy.render import render_panoramas, render_views
from cityrag_jax.toy.scene import WEATHERS, draw_scene, sun_direction

CITY = city("paris", neighbourhoods=2, blocks=2, block_m=40.0, supersample=1)
DRIVES = drives(CITY)
HEIGHT = 256
# Means of a picture's parts, red, green and blue, 28 November 2026, jax 0.10.2, CPU.
GOLDEN = [
    [
        [75.12, 79.29, 109.69],
        [109.61, 96.0, 110.0],
        [100.86, 89.89, 105.25],
        [77.37, 77.21, 102.11],
    ],
    [
        [82.43, 73.62, 79.48],
        [78.26, 71.06, 79.94],
        [70.81, 64.62, 67.35],
        [71.03, 63.15, 64.5],
    ],
    [
        [64.77, 55.98, 52.7],
        [60.39, 53.6, 53.27],
        [74.77, 65.42, 61.53],
        [60.68, 55.04, 62.5],
    ],
    [
        [52.34, 47.63, 44.87],
        [50.35, 45.81, 43.29],
        [55.18, 50.25, 47.7],
        [53.96, 48.96, 46.25],
    ],
]


def look(drive, at, *, scene=None, time_s=None):
    """Render panoramas of one size only, so that all tests share one compilation."""
    scene = drive.scene if scene is None else scene
    time_s = drive.time_s[at] if time_s is None else time_s
    return render_panoramas(CITY, scene, drive.enu_from_camera[at], time_s, HEIGHT)


def test_rendering_twice_gives_the_same_bytes():
    at = np.array([3, 60])
    one, two = look(DRIVES[0], at), look(DRIVES[0], at)
    for name in ("rgb", "depth_m", "transient"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_pictures_of_the_default_city_stay_the_same():
    """Shipped weights and their table were made of them: means of 64 x 128 pixels.

    Within half a level of 255: compilers order sums differently, blocks average it.
    """
    picture = look(DRIVES[0], np.array([3, 60])).rgb[1].astype(float)
    means = picture.reshape(4, 64, 4, 128, 3).mean((1, 3))
    np.testing.assert_allclose(means, GOLDEN, atol=0.5)


def test_drives_are_made_the_same_twice():
    again = drives(CITY)
    for one, two in zip(DRIVES, again, strict=True):
        assert np.array_equal(one.enu_from_camera, two.enu_from_camera)
        assert np.array_equal(one.time_s, two.time_s)
        assert one.scene.seed == two.scene.seed


def test_only_traffic_differs_between_drives_in_the_same_light():
    """With another drive's traffic, all that is not traffic keeps depth and colour."""
    drive, at = DRIVES[0], np.arange(0, 200, 25)
    other = dataclasses.replace(
        drive.scene, seed=np.asarray(drive.scene.seed ^ 1, np.uint32)
    )
    # The seed also places clouds and lit windows: put them out, leave the sky aside.
    dark = np.zeros((), np.float32)
    one = look(drive, at, scene=dataclasses.replace(drive.scene, lamps=dark))
    two = look(drive, at, scene=dataclasses.replace(other, lamps=dark))
    static = ~one.transient & ~two.transient
    assert static.mean() > 0.8 and one.transient.any()
    assert np.array_equal(one.depth_m[static], two.depth_m[static])
    solid = static & np.isfinite(one.depth_m)
    assert np.array_equal(one.rgb[solid], two.rgb[solid])


def test_what_stands_is_there_from_every_camera():
    """Whatever a camera sees beyond 20 m, another 8 m farther back sees too.

    Each point is looked for in the other panorama: something must stand there or
    before it. Ragged crowns keep a few leaves to one camera: 1 of 700 points. When only
    the nearest trees and posts existed it was 1 of 170.
    """
    lost = total = 0
    rays = panorama_rays(HEIGHT)
    for drive in DRIVES[:8:2]:
        at = np.arange(40, 220, 30)
        one, two = look(drive, at), look(drive, at - 20, time_s=drive.time_s[at])
        for k in range(len(at)):
            far = ~one.transient[k] & (one.depth_m[k] > 20) & (one.depth_m[k] < 100)
            place = rays[far] * one.depth_m[k][far][:, None]
            here, there = (
                drive.enu_from_camera[at[k]],
                drive.enu_from_camera[at[k] - 20],
            )
            place = place @ here[:3, :3].T + here[:3, 3]
            seen = (place - there[:3, 3]) @ there[:3, :3]
            distance = np.linalg.norm(seen, axis=1)
            nearest, moving = around(two.depth_m[k], two.transient[k], seen)
            lost += np.sum((nearest > 1.03 * distance + 0.3) & ~moving)
            total += len(distance)
    assert total > 100_000
    assert lost / total < 1 / 600, f"{lost} of {total} points stand for one camera only"


def panorama_rays(height):
    """Give the unit direction of every pixel in the camera's axes."""
    azimuth = np.pi * (2 * (np.arange(2 * height) + 0.5) / (2 * height) - 1)
    elevation = np.pi * (0.5 - (np.arange(height) + 0.5) / height)[:, None]
    level = np.cos(elevation)
    parts = level * np.sin(azimuth), -np.sin(elevation), level * np.cos(azimuth)
    return np.stack(np.broadcast_arrays(*parts), -1)


def around(depth_m, transient, seen):
    """Give the nearest depth of the 3x3 pixels around directions, and any traffic."""
    height, width = depth_m.shape
    azimuth = np.arctan2(seen[:, 0], seen[:, 2])
    elevation = np.arcsin(-seen[:, 1] / np.linalg.norm(seen, axis=1))
    column = ((azimuth / (2 * np.pi) + 0.5) * width).astype(int)
    row = ((0.5 - elevation / np.pi) * height).astype(int)
    places = [
        (np.clip(row + dy, 0, height - 1), (column + dx) % width)
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    ]
    nearest = np.min([depth_m[place] for place in places], axis=0)
    return nearest, np.any([transient[place] for place in places], axis=0)


def test_two_drives_see_the_same_places_in_another_light():
    first, second = DRIVES[:2]
    at = np.array([10, 120])
    one = look(first, at)
    two = look(first, at, scene=second.scene, time_s=second.time_s[at])
    static = ~one.transient & ~two.transient
    assert np.array_equal(one.depth_m[static], two.depth_m[static])
    difference = np.abs(one.rgb.astype(int) - two.rgb.astype(int))
    assert difference[static].mean() > 5.0


def test_what_changes_with_time_is_transient():
    """Waiting half a minute in one place may change traffic and clouds, no more."""
    drive, at = DRIVES[0], np.arange(0, 200, 25)
    one = look(drive, at)
    two = look(drive, at, time_s=drive.time_s[at] + 30.0)
    changed = one.depth_m != two.depth_m
    assert changed.any()
    assert not np.any(changed & ~one.transient & ~two.transient)
    ground = np.isfinite(one.depth_m) & np.isfinite(two.depth_m)
    recolored = ground & np.any(one.rgb != two.rgb, axis=-1)
    assert not np.any(recolored & ~one.transient & ~two.transient)


def test_panorama_and_pinhole_view_agree_along_the_same_rays():
    """A panorama looked up along a view's rays has that view's depth, off edges."""
    drive, at = DRIVES[2], np.array([5, 70, 150])
    pose, time_s = drive.enu_from_camera[at], drive.time_s[at]
    panorama = render_panoramas(CITY, drive.scene, pose, time_s, HEIGHT)
    angle = np.deg2rad(25.0)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.eye(4)
    turned[:3, :3] = [[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]]
    view = render_views(CITY, drive.scene, pose @ turned, time_s, 60, 100, 65.0)
    half = np.tan(np.deg2rad(65.0) / 2)
    x = (2 * (np.arange(100) + 0.5) / 100 - 1) * half
    y = (2 * (np.arange(60) + 0.5) / 60 - 1) * half * 0.6
    ray = np.stack(np.broadcast_arrays(x[None], y[:, None], 1.0), -1)
    ray = ray @ turned[:3, :3].T
    azimuth = np.arctan2(ray[..., 0], ray[..., 2])
    elevation = np.arctan2(-ray[..., 1], np.hypot(ray[..., 0], ray[..., 2]))
    column = ((azimuth / (2 * np.pi) + 0.5) * 2 * HEIGHT).astype(int)
    row = ((0.5 - elevation / np.pi) * HEIGHT).astype(int)
    looked_up = panorama.depth_m[:, row, column]
    near = np.isfinite(view.depth_m) & (view.depth_m < 30.0)
    ratio = looked_up[near] / view.depth_m[near]
    # Half a pixel of 0.7 degrees is up to 8 % of depth on the ground at 30 m.
    assert np.mean(np.abs(ratio - 1.0) < 0.08) > 0.93
    assert np.median(np.abs(ratio - 1.0)) < 0.01


def test_a_pitched_camera_sees_what_the_level_one_sees(monkeypatch):
    """The general path, a walk for each sample, equals the one for each column."""
    monkeypatch.setattr(render, "LEVEL", 1e-6)
    drive, at = DRIVES[2], np.array([5, 70])
    pose, time_s = drive.enu_from_camera[at], drive.time_s[at]
    nudge = np.eye(4)
    nudge[:3, :3] = [[1, 0, 0], [0, 1, 1e-5], [0, -1e-5, 1]]
    level = render_views(CITY, drive.scene, pose, time_s, 60, 100, 65.0)
    tilted = render_views(CITY, drive.scene, pose @ nudge, time_s, 60, 100, 65.0)
    same = np.isclose(level.depth_m, tilted.depth_m, rtol=1e-3, equal_nan=True)
    assert same.mean() > 0.99
    shade = np.abs(level.rgb.astype(int) - tilted.rgb.astype(int)).max(axis=-1)
    assert np.mean(shade <= 2) > 0.98


def test_level_ground_has_the_depth_of_a_plane():
    """Straight below, 2.2 m; at elevation e, 2.2 m / sin(-e)."""
    seen = look(DRIVES[0], np.array([40, 41]))
    elevation = np.pi * ((np.arange(HEIGHT) + 0.5) / HEIGHT - 0.5)
    below = elevation > np.deg2rad(50.0)
    expected = CAMERA_HEIGHT_M / np.sin(elevation[below])
    depth = np.median(seen.depth_m[:, below], axis=2)
    np.testing.assert_allclose(depth, np.broadcast_to(expected, depth.shape), rtol=1e-3)


def test_facades_differ_between_places_and_cities():
    """Same light, same view along the street, other junction: another picture."""
    drive = DRIVES[0]
    pose = np.repeat(drive.enu_from_camera[:1], 6, axis=0)
    pose[:, :2, 3] = CITY.block_m * np.array(
        [[0, 0], [1, 0], [2, 1], [5, 3], [90, -70], [-4, 8]]
    ) + np.array([1.0, 1.0])
    time_s = np.full(6, drive.time_s[0])
    rgb = render_panoramas(CITY, drive.scene, pose, time_s, HEIGHT).rgb.astype(int)
    walls = rgb[:, HEIGHT // 4 : HEIGHT // 2]
    for one in range(6):
        for two in range(one):
            assert np.abs(walls[one] - walls[two]).mean() > 8.0
    elsewhere = dataclasses.replace(CITY, seed=CITY.seed + 1)
    other = render_panoramas(elsewhere, drive.scene, pose, time_s, HEIGHT).rgb
    assert np.abs(walls - other[:, HEIGHT // 4 : HEIGHT // 2].astype(int)).mean() > 8.0


def test_a_batch_may_mix_scenes_and_is_the_sum_of_its_parts():
    scenes = [
        draw_scene(np.random.default_rng(k), w, 48.9, 2.35)
        for k, w in enumerate(WEATHERS)
    ]
    pose = DRIVES[0].enu_from_camera[np.arange(6) * 30]
    time_s = np.array([float(scene.start_time_s) + 5.0 for scene in scenes])
    together = render_panoramas(CITY, scenes, pose, time_s, HEIGHT)
    for k, scene in enumerate(scenes):
        alone = render_panoramas(
            CITY, scene, pose[k : k + 1], time_s[k : k + 1], HEIGHT
        )
        assert np.array_equal(alone.rgb[0], together.rgb[k])
        assert 20 < together.rgb[k].mean() < 220


def test_every_street_is_driven_at_least_twice_inside_its_neighbourhood():
    for neighbourhood in range(4):
        wanted = streets(CITY, neighbourhood)
        assert len(wanted) == 12
        taken = [
            frozenset(pair)
            for route in routes(CITY, neighbourhood)
            for pair in zip(route[:-1], route[1:], strict=True)
        ]
        assert set(taken) == wanted
        others = set.union(*(streets(CITY, n) for n in range(4) if n != neighbourhood))
        assert not wanted & others
    for route in {drive.route for drive in DRIVES}:
        assert sum(drive.route == route for drive in DRIVES) == 2


def test_drives_of_a_route_stay_close_but_differ():
    for first, second in zip(DRIVES[::2], DRIVES[1::2], strict=True):
        assert first.route == second.route
        one, two = (d.enu_from_camera[:, :2, 3] for d in (first, second))
        distance, nearest = cKDTree(two).query(one)
        assert distance.mean() < 2.0
        headings = [d.enu_from_camera[:, :2, 2] for d in (first, second)]
        agreement = np.sum(headings[0] * headings[1][nearest], axis=1)
        assert np.median(agreement) > 0.99
        assert abs(first.time_s[0] - second.time_s[0]) > 600.0
        assert first.scene.seed != second.scene.seed


def test_captures_keep_their_step_and_turn_corners_smoothly():
    turned = 0
    for drive in DRIVES:
        step = np.linalg.norm(np.diff(drive.enu_from_camera[:, :3, 3], axis=0), axis=1)
        moving = step > 0.02
        assert step.max() < CITY.step_m[1] + 1e-6
        assert step[moving].min() > 0.9 * CITY.step_m[0]
        forward = drive.enu_from_camera[:, :3, 2]
        bend = np.arccos(np.clip(np.sum(forward[1:] * forward[:-1], axis=1), -1, 1))
        assert np.rad2deg(bend.max()) < 10.0
        window = np.sum(forward[33:] * forward[:-33], axis=1)
        turned += np.any(window < np.cos(np.pi / 4))
        rotation = drive.enu_from_camera[:, :3, :3]
        product = np.einsum("nij,nkj->nik", rotation, rotation)
        np.testing.assert_allclose(
            product, np.eye(3)[None].repeat(len(product), 0), atol=1e-12
        )
        np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-12)
        assert np.all(np.diff(drive.time_s) > 0)
    assert turned > len(DRIVES) / 2


def test_cameras_never_stand_inside_a_building():
    seen = look(DRIVES[4], np.arange(0, 240, 12))
    horizon = seen.depth_m[:, HEIGHT // 2 - 6 : HEIGHT // 2 - 1]
    assert horizon.min() > 0.3


def test_the_sun_stands_where_it_should():
    """South at noon in Paris at midsummer, 64.6 degrees high; down at midnight."""
    noon = 1_687_348_800.0 - 2.3522 / 360 * 86400  # 21 June 2023, 12:00 UTC
    sun = sun_direction(noon, 48.8566, 2.3522)
    assert abs(np.rad2deg(np.arcsin(sun[2])) - 64.6) < 0.5
    assert sun[1] < 0 and abs(sun[0]) < 0.02
    assert sun_direction(noon + 43200, 48.8566, 2.3522)[2] < 0
    assert sun_direction(noon - 6 * 3600, 48.8566, 2.3522)[0] > 0.5


def test_wrong_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match="atlantis"):
        city("atlantis")
    with pytest.raises(ValueError, match="blocks is 0"):
        city("paris", blocks=0)
    drive = DRIVES[0]
    with pytest.raises(ValueError, match="2 poses, 2 times and 3 scenes"):
        render_panoramas(
            CITY, [drive.scene] * 3, drive.enu_from_camera[:2], drive.time_s[:2], 64
        )
    with pytest.raises(ValueError, match="180"):
        render_views(
            CITY, drive.scene, drive.enu_from_camera[:1], drive.time_s[:1], 8, 8, 190.0
        )
