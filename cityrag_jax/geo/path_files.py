"""Paths as text: what people draw comes in, what was asked for goes out.

A drawn path becomes rows of latitude, longitude and height.

Latitude and longitude are WGS84 degrees; the height of the camera above the ellipsoid
is in metres, and NaN where the text gives none. GeoJSON (RFC 7946) puts longitude
first, CSV here latitude first.
"""

import csv
import io
import json

import numpy as np
from jaxtyping import Float32, Float64
from scipy.spatial.transform import Rotation


def parse_path(text: str, file_name: str) -> Float64[np.ndarray, "M 3"]:
    """Read a path in the format that the file's name ends in: .geojson, .json, .csv."""
    suffix = file_name.rsplit(".", 1)[-1].lower()
    if suffix in ("geojson", "json"):
        return parse_geojson(text, file_name)
    if suffix == "csv":
        return parse_csv(text, file_name)
    raise ValueError(
        f"{file_name}: paths are read from .geojson and .csv, not from .{suffix}; "
        "convert it, or write lines of latitude,longitude into a .csv."
    )


def parse_geojson(text: str, file_name: str = "GeoJSON") -> Float64[np.ndarray, "M 3"]:
    """Read the one LineString of a GeoJSON geometry, feature or collection."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file_name} is not JSON: {error}.") from error
    lines = list(_line_strings(document))
    if len(lines) != 1:
        raise ValueError(
            f"{file_name} holds {len(lines)} LineStrings; a path needs exactly one."
        )
    rows = []
    for number, point in enumerate(lines[0], 1):
        if not isinstance(point, list) or len(point) not in (2, 3):
            raise ValueError(
                f"{file_name}: point {number} is {point!r}; "
                "write [longitude, latitude] or [longitude, latitude, height]."
            )
        rows.append([point[1], point[0], *point[2:]])
    return _checked(rows, file_name)


def _line_strings(node):
    if not isinstance(node, dict):
        return
    if node.get("type") == "LineString":
        yield node.get("coordinates", [])
    for child in (node.get("geometry"), *(node.get("features") or ())):
        yield from _line_strings(child)
    for child in node.get("geometries") or ():
        yield from _line_strings(child)


def parse_csv(text: str, file_name: str = "CSV") -> Float64[np.ndarray, "M 3"]:
    """Read lines of latitude,longitude[,height]; a first line of names is skipped."""
    rows = []
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if number == 1 and any(cell.lower().startswith("lat") for cell in cells):
            names = [cell.lower()[:3] for cell in cells]
            if names[:2] != ["lat", "lon"]:
                raise ValueError(
                    f"{file_name}: columns are {cells}; "
                    "they must be latitude,longitude[,height]."
                )
            continue
        if len(cells) not in (2, 3):
            raise ValueError(
                f"{file_name}, line {number}: {len(cells)} values in {row!r}; "
                "write latitude,longitude or latitude,longitude,height."
            )
        rows.append(cells)
    return _checked(rows, file_name)


def _checked(rows: list, file_name: str) -> Float64[np.ndarray, "M 3"]:
    if len(rows) < 2:
        raise ValueError(
            f"{file_name} holds {len(rows)} points; a path needs 2 or more."
        )
    path = np.full((len(rows), 3), np.nan)
    for k, row in enumerate(rows):
        try:
            path[k, : len(row)] = [float(value) for value in row]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file_name}: point {k + 1} is {row!r}, which is not all numbers."
            ) from error
    bad = ~((np.abs(path[:, 0]) <= 90) & (np.abs(path[:, 1]) <= 180))
    if bad.any():
        k = int(np.argmax(bad))
        raise ValueError(
            f"{file_name}: point {k + 1} has latitude {path[k, 0]} and longitude "
            f"{path[k, 1]}; they must lie within 90 and 180 degrees. GeoJSON puts "
            "longitude first, CSV latitude."
        )
    return path


def format_tum(first_from_camera: Float32[np.ndarray, "N 4 4"], fps: float) -> str:
    """Write poses as a TUM trajectory: seconds, place in metres, quaternion x y z w.

    Of the cameras in the frame of the first one: x right, y down, z forward.
    """
    quaternions = Rotation.from_matrix(first_from_camera[:, :3, :3]).as_quat(
        canonical=True
    )
    rows = np.concatenate([first_from_camera[:, :3, 3], quaternions], axis=1)
    lines = [
        "# seconds x y z qx qy qz qw, in the first camera's frame (OpenCV), metres"
    ]
    for number, row in enumerate(rows):
        numbers = " ".join(f"{value:.9g}" for value in row)
        lines.append(f"{number / fps:.6f} {numbers}")
    return "\n".join(lines) + "\n"
