"""A city and the views of a path as a file for the Rerun viewer (rerun.io, extra).

In space and along the path's poses: the drives, the path, and for each view the camera
where its capture stands, looking as it is shown. Wrong axes, mounts and heights are
seen at once. Metres east, north and up of the city's anchor.
"""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from cityrag_jax.data.clips import view_yaws
from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import ecef_from_enu, invert_rigid
from cityrag_jax.geo.grounding import Views
from cityrag_jax.geo.trajectory import yaw_rotation

EXTRA = "pip install -e '.[rerun]'"
MOST = 200_000  # points of drives
POSE = "pose"  # the timeline: frames of the path


def import_rerun() -> Any:
    """Give the library; ValueError tells how it is installed."""
    try:
        import rerun
    except ImportError as error:
        raise ValueError(f"--rerun needs the rerun-sdk: {EXTRA}.") from error
    return rerun


def write_rerun(
    path: Path,
    city: City,
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    views: Views,
    frames: UInt8[np.ndarray, "n H W 3"],
    fov_deg: float,
) -> None:
    """Write drives, path and views, whole or not at all."""
    rr = import_rerun()
    enu_from_ecef = invert_rigid(ecef_from_enu(*city.header.anchor))
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with rr.RecordingStream(f"cityrag_jax {city.name}") as stream:
        stream.save(temporary)
        up = rr.ViewCoordinates.RIGHT_HAND_Z_UP
        stream.log("world", up, static=True)
        _log_lines(rr, stream, city, ecef_from_camera, enu_from_ecef)
        turned = yaw_rotation(view_yaws(city, views))
        poses = city.captures.ecef_from_camera[views.captures] @ turned
        poses = enu_from_ecef @ poses
        height, width = frames.shape[1:3]
        focal = float(width / 2 / np.tan(np.deg2rad(fov_deg) / 2))
        lens = rr.Pinhole(
            focal_length=focal,
            width=width,
            height=height,
            camera_xyz=rr.ViewCoordinates.RDF,
        )
        stream.log("world/view", lens, static=True)
        for k, pose in enumerate(poses):
            stream.set_time(POSE, sequence=int(round(float(views.frame[k]))))
            place = rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3])
            stream.log("world/view", place)
            _, jpeg = cv2.imencode(".jpg", frames[k][..., ::-1])
            content = rr.EncodedImage(contents=jpeg.tobytes(), media_type="image/jpeg")
            stream.log("world/view/picture", content)
    os.replace(temporary, path)


def _log_lines(rr: Any, stream: Any, city: City, ecef_from_camera, enu_from_ecef):
    def enu(ecef_m: np.ndarray) -> np.ndarray:
        return ecef_m @ enu_from_ecef[:3, :3].T + enu_from_ecef[:3, 3]

    every, edges = max(1, len(city) // MOST), city.index.drive_edges
    position_m = enu(city.index.position_m)
    drives = [position_m[a:b:every] for a, b in zip(edges, edges[1:], strict=False)]
    grey, red = (150, 150, 150), (220, 40, 40)
    stream.log("world/drives", rr.LineStrips3D(drives, colors=grey), static=True)
    route = enu(ecef_from_camera[:, :3, 3])
    stream.log("world/path", rr.LineStrips3D([route], colors=red), static=True)
