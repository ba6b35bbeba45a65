"""Which way a photo looks, told by panoramas that were taken near it.

Points of the photo (SIFT: Lowe 2004) are found again in views all around each capture
nearby. A pair of points says one heading: the panorama's bearing of it less the
photo's. True pairs agree within a few degrees, for buildings are far compared with the
distance between the cameras, and wrong ones say anything; so the heading is where most
agree.
"""

import dataclasses
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import ecef_from_geodetic
from cityrag_jax.geo.trajectory import headings

VIEW, FOV_DEG, EVERY_DEG = (480, 640), 75.0, 60.0  # of the views around a capture
FOCAL = VIEW[1] / 2 / np.tan(np.deg2rad(FOV_DEG) / 2)
RATIO = 0.8  # of the best distance to the second best, Lowe's
AGREE_DEG, APART_DEG = 4.0, 15.0  # from the same heading; from another one
FEWEST, CLEAR = 12, 2.0  # pairs that agree; times as many as agree on anything else


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Heading and pitch of a photo, the pairs that agree on it, how many agree on the
    next best one, and the capture that has the most."""

    heading_deg: float
    pitch_deg: float
    agreeing: int
    others: int
    capture: int

    @property
    def sure(self) -> bool:
        """Say whether it may be trusted."""
        return self.agreeing >= FEWEST and self.agreeing >= CLEAR * self.others


class Points(NamedTuple):
    """Descriptors, and where their points are seen: degrees to the right and up."""

    descriptors: Float32[np.ndarray, "n 128"]
    bearing_deg: Float64[np.ndarray, " n"]
    rise_deg: Float64[np.ndarray, " n"]


def find_points(picture: UInt8[np.ndarray, "H W 3"], focal: float) -> Points:
    """Find points of a picture whose camera is level."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    # Fog and dusk leave little contrast; each part of the picture gets the same.
    grey = cv2.createCLAHE(3.0, (8, 8)).apply(grey)
    found, descriptors = cv2.SIFT_create(2000).detectAndCompute(grey, None)
    if descriptors is None:
        return Points(np.zeros((0, 128), np.float32), np.zeros(0), np.zeros(0))
    place = np.array([point.pt for point in found])
    height, width = grey.shape
    x, y = ((place - ((width - 1) / 2, (height - 1) / 2)) / focal).T
    rise = np.arctan2(-y, np.hypot(x, 1))
    return Points(descriptors, np.rad2deg(np.arctan(x)), np.rad2deg(rise))


def look_around(city: City, capture: int) -> Points:
    """Find points all around a capture; bearings are from north."""
    heading_deg = float(
        np.rad2deg(headings(city.captures.ecef_from_camera[[capture]])[0])
    )
    yaws_deg, parts = np.arange(0.0, 360.0, EVERY_DEG), []
    same = np.full(len(yaws_deg), capture)
    kinds = dict(height=VIEW[0], width=VIEW[1], fov_deg=FOV_DEG)
    views = city.crops(same, np.deg2rad(yaws_deg), **kinds)
    for yaw_deg, view in zip(yaws_deg.tolist(), views, strict=True):
        points = find_points(view, float(FOCAL))
        # Where views overlap a point is taken once, or it would compete with itself.
        mine = np.abs(points.bearing_deg) <= EVERY_DEG / 2
        bearing = points.bearing_deg[mine] + yaw_deg + heading_deg
        rise_deg = points.rise_deg[mine]
        parts.append(Points(points.descriptors[mine], bearing, rise_deg))
    return Points(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def compare(photo: Points, around: Points) -> tuple[np.ndarray, np.ndarray]:
    """Give the heading and the pitch that each pair of points says."""
    if len(photo.descriptors) == 0 or len(around.descriptors) < 2:
        return np.zeros(0), np.zeros(0)
    pairs = cv2.BFMatcher().knnMatch(photo.descriptors, around.descriptors, k=2)
    rows = np.array(
        [(a.queryIdx, a.trainIdx) for a, b in pairs if a.distance < RATIO * b.distance],
        int,
    ).reshape(-1, 2)
    of_photo, of_city = rows.T
    heading = around.bearing_deg[of_city] - photo.bearing_deg[of_photo]
    pitch = around.rise_deg[of_city] - photo.rise_deg[of_photo]
    return heading % 360, pitch


def locate_photo(
    city: City,
    photo: UInt8[np.ndarray, "h w 3"],
    latitude_deg: float,
    longitude_deg: float,
    fov_deg: float,
    *,
    radius_m: float = 15.0,
    most: int = 12,
) -> Proposal:
    """Propose how a photo looks from a place, by the `most` nearest captures.

    Raises ValueError where the city has no capture within `radius_m`.
    """
    place = ecef_from_geodetic(latitude_deg, longitude_deg, 0.0)
    distance_m, near = city.index.tree.query(place, k=min(most, len(city)))
    near = np.atleast_1d(near)[np.atleast_1d(distance_m) <= radius_m]
    if len(near) == 0:
        raise ValueError(
            f"{city.folder} has no capture within {radius_m:g} m of "
            f"{latitude_deg:.6f}, {longitude_deg:.6f}; the nearest is "
            f"{np.min(distance_m):.0f} m away. Are latitude and longitude swapped?"
        )
    width = round(2 * FOCAL * np.tan(np.deg2rad(fov_deg) / 2))
    size = (width, round(width * photo.shape[0] / photo.shape[1]))
    points = find_points(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), FOCAL)
    said = [compare(points, look_around(city, int(capture))) for capture in near]
    heading = np.concatenate([h for h, _ in said])
    pitch = np.concatenate([p for _, p in said])
    capture = np.repeat(near, [len(h) for h, _ in said])
    return choose_heading(heading, pitch, capture)


def choose_heading(
    heading_deg: Float64[np.ndarray, " n"],
    pitch_deg: Float64[np.ndarray, " n"],
    capture: np.ndarray,
) -> Proposal:
    """Give the heading that most pairs say."""
    if len(heading_deg) == 0:
        return Proposal(0.0, 0.0, 0, 0, -1)
    tried = np.arange(0.0, 360.0, 1.0)
    off = _apart(heading_deg[None], tried[:, None])
    agree = np.sum(np.abs(off) <= AGREE_DEG, axis=1)
    best = int(np.argmax(agree))
    others = agree[np.abs(_apart(tried, tried[best])) > APART_DEG]
    mine = np.abs(off[best]) <= AGREE_DEG
    heading = (tried[best] + np.median(off[best][mine])) % 360
    numbers, counts = np.unique(capture[mine], return_counts=True)
    return Proposal(
        round(float(heading), 1),
        round(float(np.median(pitch_deg[mine])), 1),
        int(agree[best]),
        int(others.max()),
        int(numbers[np.argmax(counts)]),
    )


def _apart(a_deg: np.ndarray, b_deg: np.ndarray | float) -> np.ndarray:
    return (a_deg - b_deg + 180) % 360 - 180
