"""Paths as text: what people draw comes in, what was asked for goes out.

Latitude and longitude are WGS84 degrees; a height is in metres, NaN where the text
gives none. It may count from the ellipsoid or from the sea: `matching.fill_heights`
finds out. GeoJSON (RFC 7946) and KML put longitude first, GPX names both, a CSV names
its columns or puts latitude first.
"""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64
from scipy.spatial.transform import Rotation

from cityrag_jax.geo.camera_files import ANCHOR_NOTE
from cityrag_jax.geo.ecef import ecef_from_geodetic

MEET_M = 20.0  # lines whose ends lie nearer are one
SUFFIXES = ("geojson", "json", "gpx", "kml", "csv")
COLUMNS = {
    "latitude": ("lat", "latitude", "lat_deg", "latitude_deg"),
    "longitude": ("lon", "lng", "long", "longitude", "lon_deg", "longitude_deg"),
    "height": (
        "height",
        "ele",
        "elevation",
        "alt",
        "altitude",
        "height_m",
        "altitude_m",
    ),
}
Lines = list[Float64[np.ndarray, "_ 3"]]


def parse_path(text: str, file_name: str) -> Float64[np.ndarray, "M 3"]:
    """Read a path in the format that the file's name ends in; see SUFFIXES."""
    suffix = file_name.rsplit(".", 1)[-1].lower()
    if suffix in ("geojson", "json"):
        return parse_geojson(text, file_name)
    if suffix == "gpx":
        return parse_gpx(text, file_name)
    if suffix == "kml":
        return parse_kml(text, file_name)
    if suffix == "csv":
        return parse_csv(text, file_name)
    hint = "unzip it and give the .kml in it" if suffix == "kmz" else "convert it"
    raise ValueError(
        f"{file_name}: paths are read from .{', .'.join(SUFFIXES)}, not from "
        f".{suffix}; {hint}, or write lines of latitude,longitude into a .csv."
    )


def parse_geojson(text: str, file_name: str = "GeoJSON") -> Float64[np.ndarray, "M 3"]:
    """Read lines, outlines or else points in their order, however they are wrapped."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file_name} is not JSON: {error}.") from error
    if isinstance(document, list):
        document = {"type": "LineString", "coordinates": document}
    shapes = list(_shapes(document))
    lines = [_places(points, file_name) for kind, points in shapes if kind == "line"]
    if not lines:
        points = [point for kind, point in shapes if kind == "point"]
        if not points:
            kinds = sorted({kind for kind, _ in shapes}) or ["no geometry"]
            raise ValueError(
                f"{file_name} holds {', '.join(kinds)}, but no LineString; draw the "
                "path as a line or as points in their order."
            )
        lines = [_places(points, file_name)]
    return join_lines(lines, file_name)


def _shapes(node):
    """Give each line's list of points, and each point, of a GeoJSON object."""
    if not isinstance(node, dict):
        return
    kind, inside = node.get("type"), node.get("coordinates")
    if kind in ("LineString", "MultiPoint"):
        yield "line", inside
    elif kind == "MultiLineString":
        yield from (("line", line) for line in inside or [None])
    elif kind == "Polygon":
        yield "line", (inside or [None])[0]  # the outer ring; holes are no path
    elif kind == "Point":
        yield "point", inside
    elif inside is not None:
        yield str(kind), inside
    for name in ("geometry", "features", "geometries"):
        children = node.get(name)
        for child in children if isinstance(children, list) else [children]:
            yield from _shapes(child)


def _places(points, file_name) -> np.ndarray:
    """Turn GeoJSON positions into rows of latitude, longitude[, height]."""
    if not isinstance(points, list):
        raise ValueError(
            f"{file_name}: the coordinates of a line are {points!r}; write a list of "
            "[longitude, latitude]."
        )
    rows = []
    for number, point in enumerate(points, 1):
        if not isinstance(point, list) or len(point) not in (2, 3, 4):
            raise ValueError(
                f"{file_name}: point {number} is {point!r}; "
                "write [longitude, latitude] or [longitude, latitude, height]."
            )
        rows.append([point[1], point[0], *point[2:3]])
    return _checked(rows, file_name)


def parse_gpx(text: str, file_name: str = "GPX") -> Float64[np.ndarray, "M 3"]:
    """Read the track of a GPX file, or else its route, or else its waypoints."""
    root = read_xml(text, file_name, "gpx")
    groups = [e for e in root.iter() if local_name(e) == "trkseg"]
    groups = groups or [e for e in root.iter() if local_name(e) == "rte"] or [root]
    lines = []
    for group in groups:
        points = [e for e in group if local_name(e) in ("trkpt", "rtept", "wpt")]
        rows = [
            [
                p.get("lat"),
                p.get("lon"),
                *(c.text for c in p if local_name(c) == "ele"),
            ][:3]
            for p in points
        ]
        if rows:
            lines.append(_checked(rows, file_name, least=1))
    return join_lines(lines, file_name)


def parse_kml(text: str, file_name: str = "KML") -> Float64[np.ndarray, "M 3"]:
    """Read the lines of a KML file, or its tracks, or else its points in order."""
    root = read_xml(text, file_name, "kml")
    lines, points = [], []
    for element in root.iter():
        if local_name(element) == "Track":
            rows = [(c.text or "").split() for c in element if local_name(c) == "coord"]
        elif local_name(element) in ("LineString", "LinearRing", "Point"):
            inside = [c.text or "" for c in element if local_name(c) == "coordinates"]
            rows = [row.split(",") for row in " ".join(inside).split()]
        else:
            continue
        rows = [[row[1], row[0], *row[2:3]] for row in rows if len(row) > 1]
        (points if local_name(element) == "Point" else lines).append(rows)
    found = lines or [[row for rows in points for row in rows]]
    return join_lines([_checked(r, file_name) for r in found if r], file_name)


def read_xml(text, file_name, kind):
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{file_name} is not XML: {error}.") from error
    if local_name(root) != kind:
        raise ValueError(f"{file_name} is {local_name(root)}, not {kind}; rename it.")
    return root


def local_name(element) -> str:
    """Give an element's name without its namespace."""
    return element.tag.rsplit("}", 1)[-1]


def parse_csv(text: str, file_name: str = "CSV") -> Float64[np.ndarray, "M 3"]:
    """Read columns by their names, others left out; without names latitude first.

    A first line that holds a name is one of names. Cells are parted by commas,
    semicolons or tabs.
    """
    text = text.removeprefix("\ufeff")
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    order, rows = None, []
    for number, row in enumerate(csv.reader(io.StringIO(text), delimiter=delimiter), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if delimiter == ";":
            cells = [cell.replace(",", ".") for cell in cells]
        if order is None:
            order = _column_order(cells, file_name)
            if any(c and not _is_number(c) for c in cells) and _has_names(cells):
                continue
        if len(cells) <= max(order[:2]) or (order == [0, 1, 2] and len(cells) > 3):
            raise ValueError(
                f"{file_name}, line {number}: {len(cells)} values in {row!r}; "
                "write latitude,longitude or latitude,longitude,height."
            )
        kept = [cells[k] for k in order if k < len(cells)]
        rows.append(kept if len(kept) < 3 or kept[2] else kept[:2])
    return _checked(rows, file_name)


def _has_names(cells) -> bool:
    known = {name for names in COLUMNS.values() for name in names}
    return any(cell.lower() in known for cell in cells)


def _column_order(cells, file_name) -> list[int]:
    """Give the columns of latitude, longitude and, if there, height."""
    if not _has_names(cells):
        return [0, 1, 2]
    names, order = [cell.lower() for cell in cells], []
    for wanted, known in COLUMNS.items():
        found = [k for k, name in enumerate(names) if name in known]
        if len(found) != 1 and wanted != "height":
            raise ValueError(
                f"{file_name}: columns are {cells}, {len(found)} of them the "
                f"{wanted}; name them latitude,longitude[,height]."
            )
        order += found[:1]
    return order


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def join_lines(lines: Lines, file_name: str) -> Float64[np.ndarray, "M 3"]:
    """Put lines together end to end, turned where needed; refuse those that part."""
    if not lines or sum(map(len, lines)) < 2:
        count = sum(map(len, lines))
        raise ValueError(f"{file_name} holds {count} points; a path needs 2 or more.")
    path, rest = lines[0], list(lines[1:])
    while rest:
        # The nearest of all ends to the path's end, then to its start.
        options = []
        for k, line in enumerate(rest):
            options += [(_apart(path[-1], line[0]), k, line, False)]
            options += [(_apart(path[-1], line[-1]), k, line[::-1], False)]
            options += [(_apart(path[0], line[-1]), k, line, True)]
            options += [(_apart(path[0], line[0]), k, line[::-1], True)]
        distance_m, k, line, before = min(options, key=lambda option: option[0])
        if distance_m > MEET_M:
            raise ValueError(
                f"{file_name} holds {len(lines)} lines that do not meet: the ends of "
                f"two are {distance_m:.0f} m apart. Keep the one that is the path, or "
                "draw what is missing."
            )
        path = np.concatenate([line, path] if before else [path, line])
        rest.pop(k)
    return path


def _apart(a, b) -> float:
    places = ecef_from_geodetic(*np.stack([a[:2], b[:2]]).T, np.zeros(2))
    return float(np.linalg.norm(places[1] - places[0]))


def _checked(rows: list, file_name: str, least: int = 2) -> Float64[np.ndarray, "M 3"]:
    if len(rows) < least:
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
            f"{path[k, 1]}; they must lie within 90 and 180 degrees. GeoJSON and KML "
            "put longitude first, CSV latitude."
        )
    return path


def format_lines(
    lines: Sequence[Float64[np.ndarray, "_ 2"]], facts: Sequence[dict[str, Any]]
) -> str:
    """Write lines of latitude and longitude as GeoJSON, each with what is known."""
    features = [
        {
            "type": "Feature",
            "properties": known,
            "geometry": {
                "type": "LineString",
                "coordinates": np.round(line[:, ::-1], 7).tolist(),
            },
        }
        for line, known in zip(lines, facts, strict=True)
    ]
    document = {"type": "FeatureCollection", "features": features}
    return json.dumps(document, indent=1) + "\n"


def format_tum(
    first_from_camera: Float32[np.ndarray, "N 4 4"],
    fps: float,
    ecef_from_first: Float64[np.ndarray, "4 4"],
) -> str:
    """Write poses as a TUM trajectory: seconds, place in metres, quaternion x y z w.

    Of the cameras in the frame of the first one: x right, y down, z forward. A note
    says where that stands, so that the file is a path again.
    """
    quaternions = Rotation.from_matrix(first_from_camera[:, :3, :3]).as_quat(
        canonical=True
    )
    rows = np.concatenate([first_from_camera[:, :3, 3], quaternions], axis=1)
    lines = [
        "# seconds x y z qx qy qz qw, in the first camera's frame (OpenCV), metres",
        " ".join([ANCHOR_NOTE, *(f"{x:.17g}" for x in ecef_from_first[:3].flat)]),
    ]
    for number, row in enumerate(rows):
        numbers = " ".join(f"{value:.9g}" for value in row)
        lines.append(f"{number / fps:.6f} {numbers}")
    return "\n".join(lines) + "\n"
