"""Where pictures were taken, as other programs write it: rows of names, times, places.

    .csv     columns by name: file, time, latitude, longitude, height, heading, pitch,
             roll; any order, others left out; time as Unix seconds or ISO 8601
    .gpx     a track with times, for pictures that know theirs
    .json    mapillary_image_description.json of mapillary_tools (docs of its schema):
             filename, MAPLatitude, MAPLongitude, MAPAltitude, MAPCaptureTime,
             MAPCompassHeading.TrueHeading
    and the files of `camera_files` that have names (COLMAP) or times (TUM, nuScenes),
    placed by an anchor

Degrees, metres, Unix seconds; headings clockwise from true north, pitch up, roll with
the right side down; NaN where a file is silent.
"""

import csv
import dataclasses
import datetime
import io
import json
import math
from typing import Any

import numpy as np
from jaxtyping import Float64

from cityrag_jax.geo import path_files
from cityrag_jax.geo.camera_files import (
    EARTH_M,
    Cameras,
    parse_cameras,
    place_cameras,
)
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.geo.poses import attitudes

NAMES = ("file", "filename", "file_name", "name", "picture", "image", "path")
TIMES = ("time", "time_s", "timestamp", "datetime", "captured_at", "date")
COLUMNS = {
    "time_s": TIMES,
    "latitude_deg": path_files.COLUMNS["latitude"],
    "longitude_deg": path_files.COLUMNS["longitude"],
    "height_m": path_files.COLUMNS["height"],
    "heading_deg": ("heading", "heading_deg", "yaw", "azimuth", "compass", "direction"),
    "pitch_deg": ("pitch", "pitch_deg"),
    "roll_deg": ("roll", "roll_deg"),
}


@dataclasses.dataclass(frozen=True)
class Placements:
    """Rows of a pose file; `names` is None where it goes by time alone."""

    names: tuple[str, ...] | None
    time_s: Float64[np.ndarray, " N"]
    latitude_deg: Float64[np.ndarray, " N"]
    longitude_deg: Float64[np.ndarray, " N"]
    height_m: Float64[np.ndarray, " N"]
    heading_deg: Float64[np.ndarray, " N"]
    pitch_deg: Float64[np.ndarray, " N"]
    roll_deg: Float64[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.time_s)


def parse_placements(
    text: str, file_name: str, anchor: tuple[float, float, float] | None = None
) -> Placements:
    """Read a pose file in the format that its name ends in.

    `anchor` is latitude, longitude and height of the place that local metres east,
    north and up count from.
    """
    cameras = parse_cameras(text, file_name)
    if cameras is not None:
        return _placed(cameras, file_name, anchor)
    suffix = file_name.rsplit(".", 1)[-1].lower()
    readers = {"csv": _parse_csv, "gpx": _parse_gpx, "json": _parse_descriptions}
    if suffix not in readers:
        raise ValueError(
            f"{file_name}: poses of pictures are read from .{', .'.join(readers)}, not "
            f"from .{suffix}; write a .csv with the columns file,latitude,longitude"
            "[,height,heading,time]."
        )
    names, rows = readers[suffix](text, file_name)
    if not rows:
        raise ValueError(f"{file_name} holds no poses.")
    columns = {
        name: np.array([row.get(name, math.nan) for row in rows], float)
        for name in COLUMNS
    }
    bad = ~(
        (np.abs(columns["latitude_deg"]) <= 90)
        & (np.abs(columns["longitude_deg"]) <= 180)
    )
    if bad.any():
        k = int(np.argmax(bad))
        raise ValueError(
            f"{file_name}: row {k + 1} has latitude {columns['latitude_deg'][k]} and "
            f"longitude {columns['longitude_deg'][k]}; they must lie within 90 and 180 "
            "degrees."
        )
    return Placements(names, **columns)


def _placed(
    cameras: Cameras, file_name: str, anchor: tuple[float, float, float] | None
) -> Placements:
    if cameras.names is None and cameras.time_s is None:
        raise ValueError(
            f"{file_name} has neither names nor times of pictures; write a .csv with "
            "the columns file, latitude, longitude, height, heading, pitch, roll."
        )
    at = np.linalg.norm(cameras.world_from_camera[:, :3, 3], axis=1)
    if anchor is None and cameras.ecef_from_world is None and np.median(at) < EARTH_M:
        raise ValueError(
            f"{file_name} holds local metres, up to {at.max():.0f} m from their "
            "origin; say by --anchor=LATITUDE,LONGITUDE,HEIGHT where that is."
        )
    poses = place_cameras(cameras, anchor or (0.0, 0.0, 0.0), file_name)
    latitude, longitude, height_m = geodetic_from_ecef(poses[:, :3, 3])
    heading, pitch, roll = attitudes(poses)
    time_s = cameras.time_s
    return Placements(
        cameras.names,
        np.full(len(poses), np.nan) if time_s is None else time_s,
        latitude,
        longitude,
        height_m,
        np.remainder(heading, 360),
        pitch,
        roll,
    )


def _parse_csv(text, file_name):
    text = text.removeprefix("\ufeff")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    table = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    header = [cell.strip().lower() for cell in table[0]] if table else []
    order = {
        name: k
        for name, known in {"name": NAMES, **COLUMNS}.items()
        for k, cell in enumerate(header)
        if cell in known
    }
    if not {"latitude_deg", "longitude_deg"} <= set(order) or (
        "name" not in order and "time_s" not in order
    ):
        raise ValueError(
            f"{file_name}: columns are {header}; name them file (or time), latitude, "
            "longitude and, if known, height, heading, pitch, roll."
        )
    names, rows = [], []
    for number, cells in enumerate(table[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        row = {}
        for name, k in order.items():
            cell = cells[k].strip() if k < len(cells) else ""
            if name == "name":
                names.append(cell)
            elif cell:
                row[name] = _cell(name, cell, delimiter, f"{file_name}, line {number}")
        rows.append(row)
    return tuple(names) if "name" in order else None, rows


def _cell(name: str, cell: str, delimiter: str, place: str) -> float:
    try:
        return float(cell.replace(",", ".") if delimiter == ";" else cell)
    except ValueError:
        if name == "time_s":
            return _moment(cell, place)
        raise ValueError(f"{place}: {name} is {cell!r}, which is no number.") from None


def _moment(text: str, place: str) -> float:
    """Read ISO 8601; a time without zone is UTC."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"{place}: the time {text!r} is neither Unix seconds nor ISO 8601, such as "
            "2026-05-01T10:00:00.5Z."
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return moment.timestamp()


def _parse_gpx(text, file_name):
    root = path_files.read_xml(text, file_name, "gpx")
    rows = []
    for point in root.iter():
        if path_files.local_name(point) != "trkpt":
            continue
        inside = {path_files.local_name(child): child.text for child in point}
        if not inside.get("time"):
            raise ValueError(
                f"{file_name}: point {len(rows) + 1} has no time; pictures are placed "
                "on a track by time. Record the track with times, or write a .csv."
            )
        place = f"{file_name}, point {len(rows) + 1}"
        row = {"time_s": _moment(inside["time"].strip(), place)}
        told = {
            "latitude_deg": point.get("lat"),
            "longitude_deg": point.get("lon"),
            "height_m": inside.get("ele"),
        }
        row |= {k: _cell(k, v, ",", place) for k, v in told.items() if v}
        rows.append(row)
    rows.sort(key=lambda row: row["time_s"])
    return None, rows


def _parse_descriptions(text, file_name):
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file_name} is not JSON: {error}.") from error
    names, rows = [], []
    for item in document if isinstance(document, list) else [None]:
        if not isinstance(item, dict) or "filename" not in item:
            raise ValueError(
                f"{file_name} is no mapillary_image_description.json: a list of "
                "objects with filename, MAPLatitude and MAPLongitude."
            )
        if "error" in item or item.get("filetype", "image") != "image":
            continue
        heading = item.get("MAPCompassHeading")
        told: dict[str, Any] = {
            "latitude_deg": item.get("MAPLatitude"),
            "longitude_deg": item.get("MAPLongitude"),
            "height_m": item.get("MAPAltitude"),
            "heading_deg": heading.get("TrueHeading")
            if isinstance(heading, dict)
            else None,
            "time_s": _map_time(item.get("MAPCaptureTime"), file_name),
        }
        names.append(str(item["filename"]))
        kinds = (int, float)
        rows.append({k: float(v) for k, v in told.items() if isinstance(v, kinds)})
    return tuple(names), rows


def _map_time(text, file_name) -> float | None:
    """Read mapillary_tools' year_month_day_hour_minute_second_millisecond, in UTC."""
    if text is None:
        return None
    parts = str(text).split("_")
    try:
        year, month, day, hour, minute, second, *rest = map(int, parts)
        moment = datetime.datetime(
            year, month, day, hour, minute, second, tzinfo=datetime.UTC
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file_name}: MAPCaptureTime is {text!r}, not "
            "year_month_day_hour_minute_second_millisecond."
        ) from error
    return moment.timestamp() + sum(rest[:1]) / 1000


def place_at_times(
    track: Placements, time_s: Float64[np.ndarray, " n"], most_s: float
) -> dict[str, Float64[np.ndarray, " n"]]:
    """Give places on a track at times, by the straight line between its points.

    NaN before it, behind it, and where its points are more than `most_s` apart.
    """
    order = np.argsort(track.time_s, kind="stable")
    known = track.time_s[order]
    after = np.clip(np.searchsorted(known, time_s), 1, max(len(known) - 1, 1))
    if len(known) < 2:
        inside = np.zeros(len(time_s), bool)
    else:
        inside = (time_s >= known[0]) & (time_s <= known[-1])
        inside &= known[after] - known[after - 1] <= most_s
    places = {}
    for name in ("latitude_deg", "longitude_deg", "height_m"):
        values = getattr(track, name)[order]
        if name == "longitude_deg":
            values = np.rad2deg(np.unwrap(np.deg2rad(values)))
        places[name] = np.where(inside, np.interp(time_s, known, values), np.nan)
    places["longitude_deg"] = np.remainder(places["longitude_deg"] + 180, 360) - 180
    return places
