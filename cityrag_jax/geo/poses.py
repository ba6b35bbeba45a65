"""Poses from what instruments and other programs give, and doubts about their axes.

Everything here ends in the project's own form: world_from_camera, OpenCV axes (x right,
y down, z forward), metres, float64. `CONVENTIONS` names the axes that other programs
give a camera; each entry holds the OpenCV axes, as columns, in that frame.
"""

import numpy as np
from jaxtyping import Float64

from cityrag_jax.geo.ecef import (
    ecef_from_geodetic,
    enu_axes,
    geodetic_from_ecef,
    invert_rigid,
)
from cityrag_jax.geo.trajectory import level_poses

CONVENTIONS = {
    "x right, y down, z forward": np.eye(3),
    "x right, y up, z backward": np.diag([1.0, -1.0, -1.0]),
    "x forward, y left, z up": np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float),
    "x forward, y right, z down": np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], float),
    "x right, y forward, z up": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float),
}
UPRIGHT_COS = np.cos(np.deg2rad(45.0))


def poses_from_geodetic(
    latitude_deg: Float64[np.ndarray, " N"],
    longitude_deg: Float64[np.ndarray, " N"],
    height_m: Float64[np.ndarray, " N"],
    heading_deg: Float64[np.ndarray, " N"],
    pitch_deg: Float64[np.ndarray, " N"] | float = 0.0,
    roll_deg: Float64[np.ndarray, " N"] | float = 0.0,
) -> Float64[np.ndarray, "N 4 4"]:
    """Give ecef_from_camera of cameras whose place and attitude are known.

    Heights are above the ellipsoid. Headings run clockwise from true north, pitch is
    positive upward, roll positive with the camera's right side down: a compass, and
    GPano's PoseHeadingDegrees, PosePitchDegrees and PoseRollDegrees.
    """
    count = len(latitude_deg)
    zeros = np.zeros((count, 3))
    enu_from_level = level_poses(zeros, np.deg2rad(heading_deg))[:, :3, :3]
    tilt = level_from_tilted(
        np.deg2rad(np.broadcast_to(np.asarray(pitch_deg, float), count)),
        np.deg2rad(np.broadcast_to(np.asarray(roll_deg, float), count)),
    )
    ecef_from_enu = enu_axes(latitude_deg, longitude_deg)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = ecef_from_enu @ enu_from_level @ tilt
    poses[:, :3, 3] = ecef_from_geodetic(latitude_deg, longitude_deg, height_m)
    return poses


def level_from_tilted(
    pitch_rad: Float64[np.ndarray, "*N"] | float,
    roll_rad: Float64[np.ndarray, "*N"] | float,
) -> Float64[np.ndarray, "*N 3 3"]:
    """Give the rotations of cameras that pitch up and then roll their right side down.

    From the tilted camera's frame to that of a level one with the same heading.
    """
    shape = (*np.shape(pitch_rad), 3, 3)
    level_from_pitched = np.tile(np.eye(3), (*shape[:-2], 1, 1)).reshape(shape)
    pitched_from_tilted = level_from_pitched.copy()
    sine, cosine = np.sin(pitch_rad), np.cos(pitch_rad)
    level_from_pitched[..., 1, 1] = level_from_pitched[..., 2, 2] = cosine
    level_from_pitched[..., 1, 2], level_from_pitched[..., 2, 1] = -sine, sine
    sine, cosine = np.sin(roll_rad), np.cos(roll_rad)
    pitched_from_tilted[..., 0, 0] = pitched_from_tilted[..., 1, 1] = cosine
    pitched_from_tilted[..., 1, 0], pitched_from_tilted[..., 0, 1] = sine, -sine
    return level_from_pitched @ pitched_from_tilted


def attitudes(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
) -> tuple[
    Float64[np.ndarray, " N"], Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]
]:
    """Give heading, pitch and roll in degrees, as `poses_from_geodetic` takes them."""
    latitude_deg, longitude_deg, _ = geodetic_from_ecef(ecef_from_camera[:, :3, 3])
    axes = enu_axes(latitude_deg, longitude_deg)
    enu_from_camera = np.einsum("nji,njk->nik", axes, ecef_from_camera[:, :3, :3])
    right, down, forward = np.moveaxis(enu_from_camera, 2, 0)
    heading = np.arctan2(forward[:, 0], forward[:, 1])
    pitch = np.arcsin(np.clip(forward[:, 2], -1, 1))
    roll = np.arctan2(-right[:, 2], -down[:, 2])
    return np.rad2deg(heading), np.rad2deg(pitch), np.rad2deg(roll)


def to_opencv(
    world_from_camera: Float64[np.ndarray, "N 4 4"], convention: str
) -> Float64[np.ndarray, "N 4 4"]:
    """Give poses whose cameras have axes of `CONVENTIONS` OpenCV's axes."""
    if convention not in CONVENTIONS:
        raise ValueError(
            f"No axes are called {convention!r}; choose of "
            f"{'; '.join(map(repr, CONVENTIONS))}."
        )
    turned = world_from_camera.copy()
    turned[:, :3, :3] = world_from_camera[:, :3, :3] @ CONVENTIONS[convention]
    return turned


def share_upright(ecef_from_camera: Float64[np.ndarray, "N 4 4"]) -> float:
    """Give the share of cameras whose y axis lies within 45 degrees of down."""
    return float(np.mean(_down_cosine(ecef_from_camera) > UPRIGHT_COS))


def least_upright(ecef_from_camera: Float64[np.ndarray, "N 4 4"]) -> tuple[int, float]:
    """Give the camera that lies worst, and the angle of its y axis to down, degrees."""
    cosine = _down_cosine(ecef_from_camera)
    worst = int(np.argmin(cosine))
    return worst, float(np.rad2deg(np.arccos(np.clip(cosine[worst], -1, 1))))


def guess_axes(ecef_from_camera: Float64[np.ndarray, "N 4 4"]) -> list[str]:
    """Say what poses may be whose cameras do not stand upright, best first.

    Of the axes that make nearly all cameras stand, those come first that look along
    their course.
    """
    place_m = ecef_from_camera[:, :3, 3]
    guesses = []
    for convention in list(CONVENTIONS)[1:]:
        turned = to_opencv(ecef_from_camera, convention)
        if share_upright(turned) >= 0.95:
            ahead = np.gradient(place_m, axis=0) if len(place_m) > 1 else place_m
            ahead /= np.maximum(np.linalg.norm(ahead, axis=1, keepdims=True), 1e-9)
            along = float(np.mean(np.sum(ahead * turned[:, :3, 2], axis=1)))
            told = f"camera axes are {convention} (geo.poses.to_opencv turns them)"
            guesses.append((along, told))
    inverse = invert_rigid(ecef_from_camera)
    if share_upright(inverse) >= 0.95:
        told = "they are camera-from-world (invert them by geo.ecef.invert_rigid)"
        guesses.append((2.0, told))
    return [told for _, told in sorted(guesses, reverse=True)]


def _down_cosine(ecef_from_camera) -> np.ndarray:
    latitude, longitude, _ = geodetic_from_ecef(ecef_from_camera[:, :3, 3])
    up = enu_axes(latitude, longitude)[:, :, 2]
    return -np.einsum("ni,ni->n", up, ecef_from_camera[:, :3, 1])
