"""Walks in the toy city on days that are on no disk: what a demonstration is scored on.

A walk goes around a corner of a drive. Its seed is a day: light, weather and traffic.
"""

import numpy as np
from jaxtyping import Float64, UInt8

from cityrag_jax.geo.ecef import ecef_from_enu, invert_rigid
from cityrag_jax.toy.drives import CityConfig, Drive
from cityrag_jax.toy.render import render_views
from cityrag_jax.toy.scene import WEATHERS, Scene, draw_scene

CLEAR_DAY = 5


def draw_day(config: CityConfig, seed: int) -> Scene:
    """Draw a day's scene: clear for `CLEAR_DAY`, any other weather for other seeds."""
    rng = np.random.default_rng(seed)
    others = [weather for weather in WEATHERS if weather != "clear"]
    weather = "clear" if seed == CLEAR_DAY else str(rng.choice(others))
    return draw_scene(rng, weather, config.latitude_deg, config.longitude_deg)


def film(
    config: CityConfig,
    seed: int,
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    height: int,
    width: int,
    fov_deg: float,
) -> UInt8[np.ndarray, "N {height} {width} 3"]:
    """Render what a camera sees along a path on a day, ten frames a second."""
    scene = draw_day(config, seed)
    anchor = ecef_from_enu(config.latitude_deg, config.longitude_deg, config.height_m)
    poses = invert_rigid(anchor) @ ecef_from_camera
    times = float(scene.start_time_s) + 0.1 * np.arange(len(poses))
    return render_views(config, scene, poses, times, height, width, fov_deg).rgb


def sharpest_corner(
    drive: Drive, length_m: float
) -> tuple[float, Float64[np.ndarray, "n 3"]]:
    """Give the sharpest turn, radians, of all walks of a length along a drive.

    And that walk's places in east-north-up, one every 2 m.
    """
    places = drive.enu_from_camera[:, :3, 3]
    along = np.concatenate(
        [[0.0], np.cumsum(np.linalg.norm(np.diff(places, axis=0), axis=1))]
    )
    forward = drive.enu_from_camera[:, :3, 2]
    heading = np.unwrap(np.arctan2(forward[:, 0], forward[:, 1]))
    starts = np.arange(0.0, along[-1] - length_m, 1.0)
    before = np.interp(starts + 0.25 * length_m, along, heading)
    turns = np.abs(np.interp(starts + 0.75 * length_m, along, heading) - before)
    points = starts[np.argmax(turns)] + np.arange(0.0, length_m + 0.1, 2.0)
    enu = np.stack([np.interp(points, along, places[:, k]) for k in range(3)], -1)
    return float(turns.max()), enu
