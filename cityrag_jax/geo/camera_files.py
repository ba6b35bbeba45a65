"""Camera poses as other programs write them, each by its own convention.

    TUM       "time x y z qx qy qz qw" a line, world_from_camera
              (cvg.cit.tum.de/data/datasets/rgbd-dataset/file_formats)
    KITTI     12 numbers a line, the upper rows of world_from_camera (readme of the
              odometry benchmark's devkit, cvlibs.net)
    COLMAP    images.txt: "id qw qx qy qz tx ty tz camera name", camera_from_world;
              each such line has one of points behind it (colmap.github.io/format.html)
    nuScenes  ego_pose.json and likes: a list of objects with translation [x, y, z],
              rotation [w, x, y, z] and a timestamp in microseconds; x forward, y left,
              z up (nuscenes-devkit, docs/schema_nuscenes.md)
    npy       an array [N, 3 or 4, 4], world_from_camera

The world is ECEF, or metres east, north and up of an anchor; which of them is seen by
the distance from Earth's centre. Cameras have OpenCV's axes, but nuScenes'.
"""

import dataclasses
import io
import json
import math

import numpy as np
from jaxtyping import Float64
from scipy.spatial.transform import Rotation

from cityrag_jax.geo.ecef import ecef_from_enu, invert_rigid
from cityrag_jax.geo.poses import guess_axes, least_upright, share_upright, to_opencv

UPRIGHT_SHARE = 0.95
EARTH_M = 6.3e6  # from its centre, at least
ANCHOR_NOTE = "# ecef_from_world:"
EGO_AXES = "x forward, y left, z up"


@dataclasses.dataclass(frozen=True)
class Cameras:
    """Poses of a file, in the order of its lines, OpenCV axes, metres.

    `names` are of pictures and `time_s` Unix seconds, where the format has them.
    `ecef_from_world` is known where the file says it (as ours do).
    """

    world_from_camera: Float64[np.ndarray, "N 4 4"]
    names: tuple[str, ...] | None = None
    time_s: Float64[np.ndarray, " N"] | None = None
    ecef_from_world: Float64[np.ndarray, "4 4"] | None = None


def parse_cameras(content: str | bytes, file_name: str) -> Cameras | None:
    """Read a file of poses; None where it is another kind of path."""
    if isinstance(content, bytes):
        return _parse_array(content, file_name)
    if content.lstrip()[:1] in "[{":
        return _parse_objects(content, file_name)
    lines = content.splitlines()
    rows = [line.split() for line in lines if line.strip() and line[0] != "#"]
    first = rows[0] if rows else []
    if len(first) in (8, 12) and _are_numbers(first):
        return _parse_rows(rows, lines, file_name)
    if len(first) >= 10 and _are_numbers(first[:9]):
        return _parse_images(lines, file_name)
    return None


def place_cameras(
    cameras: Cameras, anchor: tuple[float, float, float], file_name: str
) -> Float64[np.ndarray, "N 4 4"]:
    """Give ecef_from_camera; ValueError says which axes poses seem to have instead."""
    poses = cameras.world_from_camera
    if not np.isfinite(poses).all():
        k = int(np.argmin(np.isfinite(poses).all((1, 2))))
        raise ValueError(f"{file_name}: pose {k + 1} is not all numbers.")
    product = np.einsum("nji,njk->nik", poses[:, :3, :3], poses[:, :3, :3])
    error = np.abs(product - np.eye(3)).max((1, 2))
    if (error > 1e-3).any() or (np.linalg.det(poses[:, :3, :3]) < 0).any():
        k = int(np.argmax(error))
        raise ValueError(
            f"{file_name}: the rotation of pose {k + 1} is none (R^T R differs from 1 "
            f"by {error[k]:.2g}); give rows of [R | t], without scale or reflection."
        )
    if cameras.ecef_from_world is not None:
        return cameras.ecef_from_world @ poses
    away_m = np.median(np.linalg.norm(poses[:, :3, 3], axis=1))
    placed = poses if away_m > EARTH_M else ecef_from_enu(*anchor) @ poses
    if share_upright(placed) < UPRIGHT_SHARE:
        worst, angle = least_upright(placed)
        raise ValueError(
            f"{file_name}: the y axis of pose {worst + 1} is {angle:.0f} degrees from "
            f"down; only {share_upright(placed):.0%} of the cameras stand upright. "
            f"{_doubt(poses, placed)}."
        )
    return placed


def _doubt(poses: Float64[np.ndarray, "N 4 4"], placed) -> str:
    """Say what poses may be whose cameras do not stand in an upright world."""
    if np.allclose(poses[0], np.eye(4), atol=0.1):  # nobody stands so by chance
        return (
            "They stand in a world whose y axis is down, such as the first camera's "
            f"frame (KITTI's): say where it stands by a first line {ANCHOR_NOTE!r} "
            "and 12 numbers, or multiply poses by it"
        )
    guesses = guess_axes(placed) or ["turn the world so that its z axis is up"]
    return f"Perhaps {', or '.join(guesses)}"


def _parse_rows(rows: list, lines: list[str], file_name: str) -> Cameras:
    """Read lines of TUM's or KITTI's numbers, and a note of where the world stands."""
    table = _numbers(rows, len(rows[0]), file_name)
    notes = [x for x in lines if x.startswith(ANCHOR_NOTE)]
    told = [notes[0].removeprefix(ANCHOR_NOTE).split()] if notes else []
    ecef_from_world = _rows(_numbers(told, 12, file_name))[0] if told else None
    if table.shape[1] == 12:
        return Cameras(_rows(table), ecef_from_world=ecef_from_world)
    poses = _from_quaternions(table[:, 4:8], table[:, 1:4], file_name)
    return Cameras(poses, time_s=table[:, 0], ecef_from_world=ecef_from_world)


def _parse_images(lines: list[str], file_name: str) -> Cameras:
    """Read COLMAP's images.txt; lines of points, numbers alone, may be there or not."""
    told = [line for line in lines if line.strip() and not line.startswith("#")]
    rows = [x.split(maxsplit=9) for x in told if not _are_numbers(x.split())]
    table = _numbers([row[:9] for row in rows], 9, file_name)
    camera_from_world = _from_quaternions(
        np.roll(table[:, 1:5], -1, axis=1), table[:, 5:8], file_name
    )
    names = tuple(row[9].strip() if len(row) > 9 else "" for row in rows)
    return Cameras(invert_rigid(camera_from_world), names=names)


def _parse_objects(text: str, file_name: str) -> Cameras | None:
    try:
        items = json.loads(text)
    except json.JSONDecodeError:
        return None  # whoever reads paths says so
    if not isinstance(items, list) or not items or not isinstance(items[0], dict):
        return None
    if not {"translation", "rotation"} <= items[0].keys():
        return None
    rows = []
    for number, item in enumerate(items, 1):
        try:
            numbers = [item.get("timestamp", math.nan), *item["translation"]]
            w, x, y, z = item["rotation"]
            rows.append([float(value) for value in (*numbers, x, y, z, w)])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file_name}: pose {number} is {item!r}; write translation [x, y, z] "
                "and rotation [w, x, y, z]."
            ) from error
    table = _numbers(rows, 8, file_name)
    table = table[np.argsort(table[:, 0], kind="stable")]
    ego = _from_quaternions(table[:, 4:8], table[:, 1:4], file_name)
    time_s = None if np.isnan(table[:, 0]).any() else table[:, 0] / 1e6
    return Cameras(to_opencv(ego, EGO_AXES), time_s=time_s)


def _parse_array(content: bytes, file_name: str) -> Cameras:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        poses = np.asarray(array, np.float64)
    except (OSError, ValueError, TypeError, EOFError, SyntaxError) as error:
        raise ValueError(f"{file_name} is no array of numbers ({error}).") from error
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)) or not len(poses):
        raise ValueError(
            f"{file_name} holds {poses.shape}; poses are [N, 4, 4] or [N, 3, 4]."
        )
    return Cameras(_rows(poses[:, :3].reshape(-1, 12)))


def _rows(table: np.ndarray) -> Float64[np.ndarray, "N 4 4"]:
    poses = np.tile(np.eye(4), (len(table), 1, 1))
    poses[:, :3] = table.reshape(-1, 3, 4)
    return poses


def _from_quaternions(xyzw, place_m, file_name) -> Float64[np.ndarray, "N 4 4"]:
    length = np.linalg.norm(xyzw, axis=1)
    if (np.abs(length - 1) > 0.01).any():
        k = int(np.argmax(np.abs(length - 1)))
        raise ValueError(
            f"{file_name}: the quaternion of pose {k + 1} has length {length[k]:.3g}, "
            "not 1: are its columns in another order?"
        )
    poses = np.tile(np.eye(4), (len(xyzw), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(xyzw).as_matrix()
    poses[:, :3, 3] = place_m
    return poses


def _numbers(rows: list, width: int, file_name: str) -> Float64[np.ndarray, "N _"]:
    for number, row in enumerate(rows, 1):
        if len(row) != width or not _are_numbers(row):
            raise ValueError(
                f"{file_name}: pose {number} is {row!r}, not {width} numbers."
            )
    return np.array(rows, np.float64)


def _are_numbers(cells) -> bool:
    try:
        return all(math.isfinite(float(c)) or math.isnan(float(c)) for c in cells)
    except (TypeError, ValueError):
        return False
