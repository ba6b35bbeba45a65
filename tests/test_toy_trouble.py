"""The toy city is wrong where it is asked to be, by as much, and nowhere else."""

import dataclasses

import numpy as np
import pytest

from cityrag_jax.data.build import pair_config
from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.geo.matching import match_path
from cityrag_jax.geo.retrieval import index_captures
from cityrag_jax.toy import build, trouble
from cityrag_jax.toy.drives import city, drives
from cityrag_jax.toy.render import Rendering
from cityrag_jax.toy.trouble import ALL, Trouble, misbehave, read_trouble, record

SIZES = {"neighbourhoods": 1, "blocks": 2, "routes": 1, "route_streets": 4}
CONFIG = city("paris", **SIZES, step_m=(0.8, 1.2))
ANCHOR = (CONFIG.latitude_deg, CONFIG.longitude_deg, CONFIG.height_m)


@pytest.fixture(scope="module")
def made():
    return drives(CONFIG)


def captures_of(given):
    return build.columns_of(given, ANCHOR)


def index_of(given):
    columns = captures_of(given)
    return index_captures(columns.ecef_from_camera, columns.drive, columns.time_s)


def test_poses_err_by_what_is_asked_for(made):
    trouble = Trouble(noise_m=0.3, drift_m=2.0, altitude_m=6.0)
    told = [
        record(CONFIG, dataclasses.replace(drive, index=k), trouble)
        for k, drive in enumerate(made * 6)
    ]
    off = [
        (a.enu_from_camera - b.enu_from_camera)[:, :3, 3]
        for a, b in zip(told, made * 6, strict=True)
    ]
    steps = np.concatenate([np.diff(x[:, :2], axis=0) for x in off])
    assert np.std(steps) == pytest.approx(0.3 * np.sqrt(2), rel=0.1)  # white
    assert np.std(np.concatenate(off)[:, :2]) == pytest.approx(2.0, rel=0.25)
    assert all(np.ptp(x[:, 2]) < 1e-9 for x in off)  # of the whole drive
    assert 2 < np.std([x[0, 2] for x in off]) < 12
    hill = record(CONFIG, made[0], Trouble(hill_m=20.0)).enu_from_camera
    rise = (hill - made[0].enu_from_camera)[:, 2, 3]
    assert 5 < np.ptp(rise) <= 20 and np.abs(np.diff(rise)).max() < 0.4


def test_drives_stop_lose_stretches_and_come_back(made):
    trouble = Trouble(gaps=1, stops=40, reversed=1, doubled=1)
    given = misbehave(CONFIG, made, trouble)
    assert [d.index for d in given] == list(range(len(made) + 2))
    for drive in given:
        place_m = drive.enu_from_camera[:, :2, 3]
        steps_m = np.linalg.norm(np.diff(place_m, axis=0), axis=1)
        lost = np.diff(drive.time_s) > 1.5  # 25 m at about 10 m/s
        assert lost.sum() == 1 and np.all(np.diff(drive.time_s) > 0)
        assert np.diff(np.flatnonzero(steps_m)).max() > 40
    back, both = given[-2:]
    # A camera on the way back looks against the first drive's, from the other lane.
    first = made[0].enu_from_camera
    near = np.linalg.norm(
        back.enu_from_camera[:, None, :2, 3] - first[None, :, :2, 3], axis=-1
    )
    ahead = np.sum(
        back.enu_from_camera[:, :3, 2] * first[near.argmin(1), :3, 2], axis=1
    )
    assert np.median(ahead) < -0.95 and 2 < np.median(near.min(1)) < 4
    assert len(both.time_s) > 1.7 * len(back.time_s)


def test_a_troubled_city_is_still_mined_and_matched(made):
    """With every trouble at once: what the importers and the matching are for."""
    trouble = dataclasses.replace(ALL, tilt_deg=0.0)
    given = [record(CONFIG, d, trouble) for d in misbehave(CONFIG, made, trouble)]
    rules = pair_config(17, 0.0, every_pass=True)
    pairs = mine_pairs(captures_of(given), "paris", rules)
    assert len(pairs) > 10
    truth = build.columns_of(made[:1], ANCHOR).ecef_from_camera
    match = match_path(index_of(given), truth[::2])
    near_m = match.distance_m[np.isfinite(match.distance_m)]
    assert len(near_m) > 0.9 * len(match.distance_m)
    # Drift of 2 m east and north is below 4.9 m in 95 of 100; lanes are 3 m apart.
    assert np.percentile(near_m, 95) < 4.9 + 3


def test_pictures_are_of_the_true_poses_and_the_default_is_untouched(
    tmp_path, monkeypatch
):
    config, seen = dataclasses.replace(CONFIG, route_streets=1), []

    def render(config, scene, poses, times_s, height):
        seen.append(poses)
        grey = np.full((len(poses), height, 2 * height, 3), 90, np.uint8)
        flat = grey[..., 0]
        return Rendering(grey, flat.astype(np.float32), flat > 0)

    monkeypatch.setattr(build, "render_panoramas", render)
    words = dict(height=16, num_frames=9)
    plain = build.build_toy_city(config, tmp_path / "plain", **words)
    truth = np.concatenate([drive.enu_from_camera for drive in drives(config)])
    np.testing.assert_array_equal(np.concatenate(seen), truth)
    assert "trouble" not in plain.header.generator
    seen.clear()
    trouble = read_trouble("noise_m=0.5, tilt_deg=4")
    wrong = build.build_toy_city(config, tmp_path / "x", trouble=trouble, **words)
    tilted = np.concatenate(seen)
    np.testing.assert_array_equal(tilted[:, :3, 3], truth[:, :3, 3])
    upright = np.rad2deg(np.arccos(np.clip(-tilted[:, 2, 1], -1, 1)))
    assert np.mean(upright) == pytest.approx(4 * np.sqrt(np.pi / 2), rel=0.15)
    told, before = wrong.captures.ecef_from_camera, plain.captures.ecef_from_camera
    np.testing.assert_array_equal(told[:, :3, :3], before[:, :3, :3])
    off_m = np.linalg.norm((told - before)[:, :3, 3], axis=1)
    assert np.mean(off_m) == pytest.approx(0.5 * np.sqrt(np.pi / 2), rel=0.15)
    assert wrong.header.generator["trouble"]["noise_m"] == 0.5


def test_trouble_is_read_from_words():
    assert read_trouble(None) is None and read_trouble("all") == trouble.ALL
    with pytest.raises(ValueError, match="holds 'fog=1'; give NAME=NUMBER of noise_m"):
        read_trouble("gaps=1,fog=1")
