"""Camera trajectories: relative poses, yaw augmentation, paths, facing of conditions.

Camera frames are OpenCV's (x right, y down, z forward, metres); the world is ECEF.
A heading is the compass direction of a camera's z axis: radians clockwise from north.
Yaw turns about the camera's own y axis, positive to the right. Everything is float64
except the relative poses, which a network reads.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64
from scipy.ndimage import gaussian_filter1d

from cityrag_jax.geo.ecef import (
    ecef_from_enu,
    ecef_from_geodetic,
    enu_axes,
    geodetic_from_ecef,
    invert_rigid,
)


def yaw_rotation(yaw_rad: Float64[np.ndarray, "*N"]) -> Float64[np.ndarray, "*N 4 4"]:
    """Give the transform that turns a camera to the right about its y axis.

    `world_from_camera @ yaw_rotation(yaw)` is the pose of a crop taken at `yaw`.
    """
    rotation = np.zeros((*np.shape(yaw_rad), 4, 4))
    sine, cosine = np.sin(yaw_rad), np.cos(yaw_rad)
    rotation[..., 0, 0] = rotation[..., 2, 2] = cosine
    rotation[..., 0, 2] = sine
    rotation[..., 2, 0] = -sine
    rotation[..., 1, 1] = rotation[..., 3, 3] = 1
    return rotation


def relative_poses(
    world_from_camera: Float64[np.ndarray, "T 4 4"],
    world_from_first: Float64[np.ndarray, "4 4"] | None = None,
) -> Float32[np.ndarray, "T 4 4"]:
    """Express poses in a camera's frame, their first one's if none is given.

    They are float32 only after the difference.
    """
    first = world_from_camera[0] if world_from_first is None else world_from_first
    first_from_world = invert_rigid(first)
    moved = world_from_camera.copy()
    # Subtract before rotating: ECEF coordinates are millions of metres.
    moved[:, :3, 3] -= first[:3, 3]
    first_from_world[:3, 3] = 0
    return (first_from_world @ moved).astype(np.float32)


def headings(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
) -> Float64[np.ndarray, " N"]:
    """Give the compass headings of cameras, in [-pi, pi], clockwise from north."""
    latitude_deg, longitude_deg, _ = geodetic_from_ecef(ecef_from_camera[:, :3, 3])
    axes = enu_axes(latitude_deg, longitude_deg)
    forward = np.einsum("nij,ni->nj", axes, ecef_from_camera[:, :3, 2])
    return np.arctan2(forward[:, 0], forward[:, 1])


def draw_yaw(
    rng: np.random.Generator,
    num_frames: int,
    rate_deg: tuple[float, float] = (0.0, 2.0),
) -> Float64[np.ndarray, " {num_frames}"]:
    """Draw the yaw augmentation of a clip, in radians (section 3.2).

    The start is uniform over the circle; between frames the yaw grows by a rate drawn
    anew in `rate_deg`; one random sign for the clip (*assumed*: otherwise it would
    only ever turn one way).
    """
    start = rng.uniform(0, 2 * np.pi)
    sign = rng.choice((-1.0, 1.0))
    rates = np.deg2rad(rng.uniform(*rate_deg, size=num_frames - 1))
    return start + sign * np.concatenate([[0.0], np.cumsum(rates)])


def level_poses(
    positions_enu_m: Float64[np.ndarray, "N 3"], heading_rad: Float64[np.ndarray, " N"]
) -> Float64[np.ndarray, "N 4 4"]:
    """Give enu_from_camera of level cameras at places, facing headings."""
    poses = np.zeros((len(heading_rad), 4, 4))
    sine, cosine = np.sin(heading_rad), np.cos(heading_rad)
    poses[:, 0, 0], poses[:, 1, 0] = cosine, -sine
    poses[:, 2, 1] = -1
    poses[:, 0, 2], poses[:, 1, 2] = sine, cosine
    poses[:, :3, 3] = positions_enu_m
    poses[:, 3, 3] = 1
    return poses


def resample_path(
    points_m: Float64[np.ndarray, "M 3"], spacing_m: float
) -> Float64[np.ndarray, "N 3"]:
    """Give points along a polyline at a spacing, from its start to near its end."""
    steps_m = np.linalg.norm(np.diff(points_m, axis=0), axis=1)
    along_m = np.concatenate([[0.0], np.cumsum(steps_m)])
    if not spacing_m > 0 or along_m[-1] < spacing_m:
        raise ValueError(
            f"A path of {along_m[-1]:.3f} m has no two places {spacing_m} m apart; "
            "draw a longer path or choose a smaller, positive spacing."
        )
    # The margin keeps the last place when rounding puts it just past the end.
    count = int(along_m[-1] / spacing_m + 1e-9) + 1
    wanted_m = np.minimum(np.arange(count) * spacing_m, along_m[-1])
    return np.stack(
        [np.interp(wanted_m, along_m, points_m[:, k]) for k in range(3)], axis=-1
    )


def poses_along(
    points_enu_m: Float64[np.ndarray, "M 3"],
    spacing_m: float,
    *,
    turn_radius_m: float = 4.0,
) -> Float64[np.ndarray, "N 4 4"]:
    """Turn a drawn polyline into level camera poses that face along it.

    Corners are rounded by a Gaussian along the path, which keeps both ends and
    straight lines; a right angle becomes a turn of `turn_radius_m` at its tightest.
    Then the path is walked at `spacing_m`.
    """
    places = resample_path(points_enu_m, spacing_m)
    if turn_radius_m > 0:
        step_m = min(spacing_m, turn_radius_m / 4)
        dense = resample_path(points_enu_m, step_m)
        # A smoothed right angle bends by 2 / sqrt(pi) / sigma at its middle.
        deviation = 2 / np.sqrt(np.pi) * turn_radius_m / step_m
        # A short path is smoothed less, or its ends would move.
        deviation = min(deviation, (len(dense) - 1) / 4)
        places = resample_path(_smooth(dense, deviation), spacing_m)
    ahead = np.gradient(places[:, :2], axis=0)
    return level_poses(places, np.arctan2(ahead[:, 0], ahead[:, 1]))


LONGEST_STOP_S = 3600.0


def insert_stops(
    poses: Float64[np.ndarray, "N 4 4"],
    spacing_m: float,
    fps: float,
    stops: Sequence[tuple[float, float]],
) -> Float64[np.ndarray, "M 4 4"]:
    """Let the camera stand on its way: each stop is metres along it, and seconds.

    Raises ValueError for a stop that is not on the path, or no time.
    """
    counts = np.ones(len(poses), int)
    length_m = (len(poses) - 1) * spacing_m
    for at_m, time_s in stops:
        if not (0 <= at_m <= length_m and 0 < time_s <= LONGEST_STOP_S):
            raise ValueError(
                f"A stop of {time_s} s at {at_m} m: stops last more than 0 s, at most "
                f"{LONGEST_STOP_S:,.0f}, and lie on the path, which is "
                f"{length_m:.1f} m long."
            )
        counts[round(at_m / spacing_m)] += round(time_s * fps)
    return np.repeat(poses, counts, axis=0)


def _smooth(points_m: np.ndarray, deviation: float) -> np.ndarray:
    """Smooth evenly spaced points; point reflection at the ends keeps them in place."""
    reach = min(int(np.ceil(4 * deviation)), len(points_m) - 1)
    before = 2 * points_m[0] - points_m[reach:0:-1]
    after = 2 * points_m[-1] - points_m[-2 : -reach - 2 : -1]
    padded = np.concatenate([before, points_m, after])
    smooth = gaussian_filter1d(padded, deviation, axis=0, mode="nearest")
    return smooth[reach : reach + len(points_m)]


def poses_on_earth(
    path: Float64[np.ndarray, "M 3"], spacing_m: float, *, turn_radius_m: float = 4.0
) -> Float64[np.ndarray, "N 4 4"]:
    """Turn rows of latitude, longitude (degrees) and height into ecef_from_camera.

    Heights are those of the camera above the ellipsoid and must be known:
    `matching.fill_heights` takes missing ones from a city's captures.
    """
    if not np.isfinite(path).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(path))} of the path's numbers are unknown; fill "
            "missing heights with matching.fill_heights."
        )
    latitude, longitude, height = path.T
    anchor = ecef_from_enu(latitude[0], longitude[0], height[0])
    offsets = ecef_from_geodetic(latitude, longitude, height) - anchor[:3, 3]
    points_m = offsets @ anchor[:3, :3]
    return anchor @ poses_along(points_m, spacing_m, turn_radius_m=turn_radius_m)


def project_on_path(
    points_m: Float64[np.ndarray, "N 3"], path_m: Float64[np.ndarray, "T 3"]
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """Give the nearest place on a polyline, counted in its vertices, and the distance.

    A place of 2.25 lies a quarter of the way from vertex 2 to vertex 3.
    """
    if len(path_m) == 1:
        return np.zeros(len(points_m)), np.linalg.norm(points_m - path_m, axis=-1)
    steps = np.diff(path_m, axis=0)
    length2 = np.maximum(np.sum(steps**2, axis=-1), 1e-12)
    offsets = points_m[:, None] - path_m[None, :-1]
    along = np.clip(np.einsum("nti,ti->nt", offsets, steps) / length2[None], 0, 1)
    misses = offsets - along[..., None] * steps[None]
    distances = np.linalg.norm(misses, axis=-1)
    nearest = np.argmin(distances, axis=1)
    rows = np.arange(len(points_m))
    return nearest + along[rows, nearest], distances[rows, nearest]


def frames_beyond(
    points_m: Float64[np.ndarray, "N 3"], path_m: Float64[np.ndarray, "T 3"]
) -> Float64[np.ndarray, " N"]:
    """Count how many mean frame spacings each point lies beyond a path's end.

    Measured along the last direction of travel, and 0 for points whose nearest place
    is not the end or for a path that does not move.
    """
    steps = np.diff(path_m, axis=0)
    lengths_m = np.linalg.norm(steps, axis=-1)
    moving = np.flatnonzero(lengths_m > 1e-3)
    if len(moving) == 0:
        return np.zeros(len(points_m))
    direction = steps[moving[-1]] / lengths_m[moving[-1]]
    place, _ = project_on_path(points_m, path_m)
    ahead_m = (points_m - path_m[-1]) @ direction
    # Nearest to the end: on the last moving step's end or among the frames standing.
    at_end = place >= moving[-1] + 1 - 1e-9
    return np.where(at_end, np.maximum(ahead_m, 0), 0) / np.mean(lengths_m)


def facing_yaw(
    target_ecef_from_camera: Float64[np.ndarray, "T 4 4"],
    capture_ecef_from_camera: Float64[np.ndarray, "N 4 4"],
) -> Float64[np.ndarray, " N"]:
    """Give the yaw at which captures of another drive face as the target does.

    Each capture faces the target's world heading at the nearest place on the target's
    path; beyond the end the heading goes on at its last rate (DESIGN, *assumed*).
    """
    origin_m = target_ecef_from_camera[0, :3, 3]
    path_m = target_ecef_from_camera[:, :3, 3] - origin_m
    points_m = capture_ecef_from_camera[:, :3, 3] - origin_m
    heading = np.unwrap(headings(target_ecef_from_camera))
    place, _ = project_on_path(points_m, path_m)
    wanted = np.interp(place, np.arange(len(heading)), heading)
    if len(heading) > 1:
        beyond = frames_beyond(points_m, path_m)
        continued = heading[-1] + beyond * (heading[-1] - heading[-2])
        wanted = np.where(beyond > 0, continued, wanted)
    return wanted - headings(capture_ecef_from_camera)
