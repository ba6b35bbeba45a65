"""Pictures of a sphere made into the panoramas of a city: whole, level, of one size.

Conventions are those of geo/panorama.py. A picture may lack the rows near the poles,
and its camera may have been pitched and rolled: both are mended once, when a city is
made, so that a pose's heading says all of a panorama's attitude.
"""

import cv2
import numpy as np
from jaxtyping import UInt8

from cityrag_jax.geo.panorama import check_panorama_shape, pad_panorama
from cityrag_jax.geo.poses import level_from_tilted

LEVEL_RAD = np.deg2rad(0.05)  # half a pixel of a panorama 2048 high
BAND = 128  # rows whose directions are made at once


def fit_panorama(
    picture: UInt8[np.ndarray, "h w 3"],
    height: int,
    *,
    above: float = 0.0,
    below: float = 0.0,
    pitch_rad: float = 0.0,
    roll_rad: float = 0.0,
) -> UInt8[np.ndarray, "{height} _ 3"]:
    """Resample a picture of all directions around to a level panorama.

    `above` and `below` are the shares of the sphere's height that it lacks; its outer
    rows are repeated there. Means over areas when shrinking, cubic when enlarging.
    """
    check_panorama_shape(height, 2 * height)
    top, bottom = round(above * height), round(below * height)
    rows = height - top - bottom
    kind = cv2.INTER_AREA if picture.shape[0] > rows else cv2.INTER_CUBIC
    fitted = cv2.resize(picture, (2 * height, rows), interpolation=kind)
    if top or bottom:
        fitted = cv2.copyMakeBorder(fitted, top, bottom, 0, 0, cv2.BORDER_REPLICATE)
    if max(abs(pitch_rad), abs(roll_rad)) < LEVEL_RAD:
        return fitted
    return _level(fitted, pitch_rad, roll_rad)


def _level(panorama: np.ndarray, pitch_rad: float, roll_rad: float) -> np.ndarray:
    height, width, _ = panorama.shape
    per_radian = height / np.pi
    # float32 places a pixel of 4096 within a thousandth, in half the time.
    tilted_from_level = level_from_tilted(pitch_rad, roll_rad).T.astype(np.float32)
    longitude = ((np.arange(width) + 0.5) / per_radian - np.pi).astype(np.float32)
    padded, level = pad_panorama(panorama), np.empty_like(panorama)
    for first in range(0, height, BAND):
        rows = np.arange(first, min(first + BAND, height))
        depression = (rows[:, None] + 0.5) / per_radian - np.pi / 2
        depression = depression.astype(np.float32)
        across = np.cos(depression)
        rays = (
            across * np.sin(longitude),
            np.broadcast_to(np.sin(depression), (len(rows), width)),
            across * np.cos(longitude),
        )
        x, y, z = np.tensordot(tilted_from_level, np.stack(rays), 1)
        # One more, as the padded picture begins a column and a row earlier.
        scale = np.float32(per_radian)
        columns = (np.arctan2(x, z) + np.float32(np.pi)) * scale + np.float32(0.5)
        lines = np.arcsin(np.clip(y, -1, 1)) + np.float32(np.pi / 2)
        lines = lines * scale + np.float32(0.5)
        level[rows] = cv2.remap(
            padded, columns, lines, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
    return level
