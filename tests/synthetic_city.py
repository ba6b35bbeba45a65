"""Small cities for tests: drives on plain ground under a sky painted by direction.

Every pixel shows the world direction that it looks in (east, north, up as red, green,
blue), so that a crop tells where its camera faces without any renderer.
"""

from pathlib import Path

import numpy as np

from cityrag_jax.data.captures import Captures, CityHeader
from cityrag_jax.data.store import City
from cityrag_jax.data.writing import Writing, write_city
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.trajectory import level_poses

ANCHOR = (48.137, 11.575, 520.0)


def line(start, heading_deg, num, spacing=0.5):
    """Make enu_from_camera of a level drive along a straight street."""
    heading = np.deg2rad(heading_deg)
    direction = np.array([np.sin(heading), np.cos(heading), 0.0])
    places = np.asarray(start, float) + spacing * np.arange(num)[:, None] * direction
    return level_poses(places, np.full(num, heading))


def direction_panorama(enu_from_camera, height):
    """Paint 127.5 + 120 x (east, north, up) of every pixel's direction."""
    longitude = np.pi * ((np.arange(2 * height) + 0.5) / height - 1)
    depression = np.pi * ((np.arange(height) + 0.5) / height - 0.5)
    directions = np.empty((height, 2 * height, 3))
    directions[..., 0] = np.cos(depression)[:, None] * np.sin(longitude)[None, :]
    directions[..., 1] = np.sin(depression)[:, None]
    directions[..., 2] = np.cos(depression)[:, None] * np.cos(longitude)[None, :]
    enu = directions @ enu_from_camera[:3, :3].T
    return np.round(127.5 + 120 * enu).astype(np.uint8)


def columns(drives, times_s=None, neighbourhoods=None) -> Captures:
    """Make the columns of a city whose drives are a day apart, 0.1 s a capture."""
    lengths = [len(d) for d in drives]
    times_s = times_s or [1.7e9 + 86400.0 * k for k in range(len(drives))]
    total = sum(lengths)
    return Captures(
        ecef_from_camera=ecef_from_enu(*ANCHOR) @ np.concatenate(drives),
        time_s=np.concatenate(
            [t + 0.1 * np.arange(n) for t, n in zip(times_s, lengths, strict=True)]
        ),
        drive=np.repeat(np.arange(len(drives), dtype=np.int32), lengths),
        neighbourhood=np.repeat(
            np.asarray(neighbourhoods or [0] * len(drives), np.int32), lengths
        ),
        licence=np.zeros(total, np.int32),
        attribution=np.zeros(total, np.int32),
        anonymised=np.ones(total, bool),
    )


def header(name="Gradient", height=128) -> CityHeader:
    return CityHeader(name, height, ANCHOR, ("CC0-1.0",), ("nobody",), {"seed": 0})


def build(folder: Path, drives, *, height=128, name="Gradient", **kwargs) -> City:
    """Write the drives as a city of direction panoramas."""
    panoramas = (direction_panorama(p, height) for p in np.concatenate(drives))
    return write_city(
        folder,
        header(name, height),
        columns(drives, **kwargs),
        panoramas,
        how=Writing(quality=95, threads=2),
    )
