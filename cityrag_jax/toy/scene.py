"""The light of a drive in the toy city: time of day, sun, sky, weather, tint.

Everything that two drives through one street do not share, and nothing they do.
Colours are linear RGB, 1 is a white wall in full sun.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, UInt32

DAY_S = 86400.0
FIRST_DAY_S = 1_672_531_200.0  # 1 January 2023, 00:00 UTC
WEATHERS = ("clear", "cloudy", "overcast", "wet", "fog", "dusk")


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is seen on one drive besides the city: light, air, and a seed for traffic.

    `sun` points to the sun in east-north-up. `clouds` is the cover, `haze_per_m` the
    extinction, `wet` and `lamps` run from 0 to 1. `start_time_s` is in unix seconds.
    """

    sun: Float32[np.ndarray, " 3"]
    sun_rgb: Float32[np.ndarray, " 3"]
    ambient_rgb: Float32[np.ndarray, " 3"]
    zenith_rgb: Float32[np.ndarray, " 3"]
    horizon_rgb: Float32[np.ndarray, " 3"]
    tint_rgb: Float32[np.ndarray, " 3"]
    clouds: Float32[np.ndarray, ""]
    haze_per_m: Float32[np.ndarray, ""]
    wet: Float32[np.ndarray, ""]
    lamps: Float32[np.ndarray, ""]
    seed: UInt32[np.ndarray, ""]
    start_time_s: Float[np.ndarray, ""]


def sun_direction(
    time_s: float, latitude_deg: float, longitude_deg: float
) -> Float[np.ndarray, " 3"]:
    """Point to the sun in east-north-up, by mean solar time (right to 4 degrees)."""
    days = time_s / DAY_S
    declination = np.deg2rad(23.44) * np.sin(2 * np.pi * (days - 80.0) / 365.2425)
    hour_angle = 2 * np.pi * ((days + longitude_deg / 360.0) % 1.0 - 0.5)
    latitude = np.deg2rad(latitude_deg)
    east = -np.cos(declination) * np.sin(hour_angle)
    toward = np.cos(declination) * np.cos(hour_angle)
    north = np.cos(latitude) * np.sin(declination) - np.sin(latitude) * toward
    up = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * toward
    return np.array([east, north, up])


def draw_start(
    rng: np.random.Generator, weather: str, latitude_deg: float, longitude_deg: float
) -> float:
    """Draw the unix second a drive starts at: by day, or at sundown for dusk."""
    low, high = (-0.09, -0.03) if weather == "dusk" else (0.3, 0.95)
    for _ in range(10_000):
        time_s = FIRST_DAY_S + rng.uniform(0.0, 700.0) * DAY_S
        if low < sun_direction(time_s, latitude_deg, longitude_deg)[2] < high:
            return float(time_s)
    raise ValueError(
        f"No {weather} hour was found at latitude {latitude_deg}; "
        "anchor the city between the polar circles."
    )


def draw_scene(
    rng: np.random.Generator, weather: str, latitude_deg: float, longitude_deg: float
) -> Scene:
    """Draw the scene of a drive in one of `WEATHERS`."""
    if weather not in WEATHERS:
        raise ValueError(f"Weather {weather!r} is unknown; take one of {WEATHERS}.")
    time_s = draw_start(rng, weather, latitude_deg, longitude_deg)
    sun = sun_direction(time_s, latitude_deg, longitude_deg)
    low = np.clip(1.0 - sun[2] / 0.5, 0.0, 1.0)  # 1 as the sun touches the horizon
    gold = np.array([1.0, 0.9 - 0.25 * low, 0.78 - 0.4 * low])
    blue, pale = np.array([0.13, 0.3, 0.68]), np.array([0.55, 0.68, 0.82])
    grey, dim = np.array([0.5, 0.53, 0.57]), np.array([0.36, 0.39, 0.43])
    warm = np.array([0.85, 0.6, 0.42])
    pale = pale + 0.4 * low * (warm - pale)
    shade = np.array([0.36, 0.42, 0.52])
    beam, ambient, zenith, horizon, clouds, haze, wet, lamps = {
        "clear": (1.25 * gold, shade, blue, pale, 0.15, 0.0012, 0.0, 0.0),
        "cloudy": (1.0 * gold, 1.1 * shade, 1.1 * blue, pale, 0.55, 0.002, 0.0, 0.0),
        "overcast": (0.06 * gold, 1.15 * grey, grey, 1.2 * grey, 0.9, 0.004, 0.0, 0.0),
        "wet": (0.03 * gold, 0.95 * grey, dim, 1.1 * dim, 0.9, 0.007, 1.0, 0.25),
        "fog": (0.05 * gold, 1.1 * grey, 1.1 * grey, 1.15 * grey, 0.3, 0.022, 0.2, 0.1),
        "dusk": (
            0.0 * gold,
            np.array([0.13, 0.13, 0.2]),
            np.array([0.04, 0.07, 0.19]),
            np.array([0.5, 0.25, 0.2]),
            0.4,
            0.003,
            float(rng.uniform() < 0.3),
            1.0,
        ),
    }[weather]
    sun = np.array([sun[0], sun[1], max(sun[2], 0.05)])
    f32 = np.float32
    return Scene(
        sun=(sun / np.linalg.norm(sun)).astype(f32),
        sun_rgb=beam.astype(f32),
        ambient_rgb=(ambient * rng.uniform(0.9, 1.1)).astype(f32),
        zenith_rgb=np.asarray(zenith, f32),
        horizon_rgb=np.asarray(horizon, f32),
        tint_rgb=rng.uniform(0.95, 1.05, 3).astype(f32),
        clouds=np.asarray(clouds * rng.uniform(0.8, 1.1), f32),
        haze_per_m=np.asarray(haze * rng.uniform(0.8, 1.25), f32),
        wet=np.asarray(wet, f32),
        lamps=np.asarray(lamps, f32),
        seed=np.asarray(rng.integers(2**32), np.uint32),
        start_time_s=np.asarray(time_s, np.float64),
    )
