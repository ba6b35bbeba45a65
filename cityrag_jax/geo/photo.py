"""A photo's own pose: where it was taken, and its view in the model's terms (3.3).

The model's first image is level and has the field of view of its training. A photo that
was taken slightly up or down, with another lens, is resampled to that; and a path that
goes another way than the photo looks begins with a turn.
"""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from cityrag_jax.geo.ecef import drop_to_ellipsoid, ecef_from_geodetic
from cityrag_jax.geo.panorama import crop_rays
from cityrag_jax.geo.trajectory import headings, yaw_rotation

FROM_START_M = 15.0  # farther away the photo is of another place
OUTSIDE_PIXELS = 1.0  # of the photo's edge: rounding, and no more
TURN_DEG = 2.0  # a frame, at most: the fastest added in training (3.2)


@dataclasses.dataclass(frozen=True)
class PhotoPose:
    """Place, heading and pitch (up) of a photo; its field of view is horizontal.

    Degrees. None is a field of view that is taken for the model's.
    """

    latitude_deg: float
    longitude_deg: float
    heading_deg: float
    pitch_deg: float = 0.0
    fov_deg: float | None = None


def parse_photo_pose(text: str) -> PhotoPose:
    """Read "latitude,longitude,heading[,pitch[,fov]]", in degrees."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    limits = (90, 180, 360, 60, 150)
    inside = (abs(x) <= most for x, most in zip(numbers, limits, strict=False))
    too_narrow = len(numbers) == 5 and numbers[4] < 5
    if not 3 <= len(numbers) <= 5 or not all(inside) or too_narrow:
        raise ValueError(
            f"--photo-pose={text}: write latitude,longitude,heading[,pitch[,fov]] in "
            "degrees, pitch within 60 and the horizontal field of view 5 to 150."
        )
    return PhotoPose(*numbers)


def level_photo(
    photo: UInt8[np.ndarray, "h w 3"],
    pose: PhotoPose,
    height: int,
    width: int,
    fov_deg: float,
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resample a photo to the view of a level camera with a field of view.

    Raises ValueError where the photo does not show all of that view.
    """
    h, w, _ = photo.shape
    own_deg = fov_deg if pose.fov_deg is None else pose.fov_deg
    focal = w / 2 / np.tan(np.deg2rad(own_deg) / 2)
    x, y, z = np.moveaxis(crop_rays(height, width, float(np.deg2rad(fov_deg))), -1, 0)
    sine, cosine = (
        np.sin(np.deg2rad(pose.pitch_deg)),
        np.cos(np.deg2rad(pose.pitch_deg)),
    )
    y, z = cosine * y + sine * z, cosine * z - sine * y
    columns = focal * x / z + w / 2 - 0.5
    rows = focal * y / z + h / 2 - 0.5
    beyond = max(-columns.min(), columns.max() - (w - 1), -rows.min())
    beyond = max(beyond, rows.max() - (h - 1))
    if beyond > OUTSIDE_PIXELS or z.min() <= 0:
        own_v = 2 * np.rad2deg(np.arctan(h / 2 / focal))
        raise ValueError(
            f"The photo shows {own_deg:.0f} x {own_v:.0f} degrees at pitch "
            f"{pose.pitch_deg:.0f}, not all of the {fov_deg:.0f} degrees and "
            f"{height}:{width} of a level first image ({beyond:.0f} pixels are "
            "missing); give a wider photo, or no --photo-pose, which takes its middle."
        )
    # Means over areas first, or a large photo's fine structure would alias.
    shrink = max(1, int(own_deg / fov_deg * w / width))
    small = cv2.blur(photo, (shrink, shrink)) if shrink > 1 else photo
    maps = columns.astype(np.float32), rows.astype(np.float32)
    return cv2.remap(small, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def start_at_photo(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"], pose: PhotoPose
) -> Float64[np.ndarray, "N 4 4"]:
    """Let a path begin as the photo looks, and turn to its own heading from there.

    Raises ValueError if the photo was taken elsewhere than where the path starts.
    """
    place = ecef_from_geodetic(pose.latitude_deg, pose.longitude_deg, 0.0)
    start, _ = drop_to_ellipsoid(ecef_from_camera[0, :3, 3])
    apart_m = float(np.linalg.norm(place - start))
    if apart_m > FROM_START_M:
        raise ValueError(
            f"The photo was taken {apart_m:.0f} m from the path's start, at most "
            f"{FROM_START_M:.0f} are allowed; begin the path where the photo stands."
        )
    course = float(headings(ecef_from_camera[:1])[0])
    off = np.angle(np.exp(1j * (np.deg2rad(pose.heading_deg) - course)))
    left = np.abs(off) - np.deg2rad(TURN_DEG) * np.arange(len(ecef_from_camera))
    return ecef_from_camera @ yaw_rotation(np.sign(off) * np.maximum(left, 0))
