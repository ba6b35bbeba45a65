"""Camera scripts: a path in words, from a place on the map.

    start 48.1370,11.5750 20        latitude, longitude and heading, degrees
    forward 30; left 90; forward 40     metres and degrees
    stop 2; look 360 over 18        seconds; right is positive

A turn is a corner of the path, rounded as a drawn one is. The camera looks along the
path until it is told to look elsewhere, and then keeps that angle to it. It stands
while it looks around or stops.
"""

import dataclasses
import re

import numpy as np
from jaxtyping import Float64

from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.geo.trajectory import yaw_rotation

NUMBER = r"([-+]?\d+(?:\.\d+)?)"
START = re.compile(rf"start {NUMBER}\s*,\s*{NUMBER} {NUMBER}")
WORDS = re.compile(rf"(forward|left|right|stop|look) {NUMBER}(?: over {NUMBER})?")
USAGE = (
    "write a first line 'start LATITUDE,LONGITUDE HEADING', then of 'forward METRES', "
    "'left DEGREES', 'right DEGREES', 'stop SECONDS', 'look DEGREES over SECONDS'"
)


@dataclasses.dataclass(frozen=True)
class Script:
    """A path's corners, and where along it the camera stands and looks around.

    `corners` are rows of latitude, longitude and NaN; `looks` rows of metres along the
    corners, seconds, and degrees to the right by which the camera turns meanwhile.
    """

    corners: Float64[np.ndarray, "M 3"]
    looks: Float64[np.ndarray, "L 3"]


def parse_script(text: str, file_name: str = "script") -> Script:
    """Read a camera script; ValueError names the words that are none."""
    lines = [line.partition("#")[0] for line in text.splitlines()]
    said = [" ".join(s.split()) for line in lines for s in line.lower().split(";")]
    said = [words for words in said if words]
    start = START.fullmatch(said[0]) if said else None
    if start is None:
        first = repr(said[0]) if said else "nothing"
        raise ValueError(f"{file_name} begins with {first}; {USAGE}.")
    latitude, longitude, heading_deg = map(float, start.groups())
    if abs(latitude) > 90 or abs(longitude) > 180:
        raise ValueError(
            f"{file_name} starts at latitude {latitude} and longitude {longitude}; "
            "they must lie within 90 and 180 degrees."
        )
    corners, looks = _walk(said[1:], heading_deg, file_name)
    enu = np.concatenate([corners, np.zeros((len(corners), 1))], axis=1)
    axes = ecef_from_enu(latitude, longitude, 0.0)
    degrees = geodetic_from_ecef(enu @ axes[:3, :3].T + axes[:3, 3])[:2]
    rows = np.stack([*degrees, np.full(len(corners), np.nan)], axis=-1)
    return Script(rows, np.array(looks, float).reshape(-1, 3))


def _walk(said, heading_deg, file_name) -> tuple[list, list]:
    """Give the corners in metres east and north of the start, and the looks."""
    place, along_m, corners, looks = np.zeros(2), 0.0, [np.zeros(2)], []
    for words in said:
        match = WORDS.fullmatch(words)
        if match is None or (match[1] == "look") != (match[3] is not None):
            raise ValueError(f"{file_name}: {words!r} is not understood; {USAGE}.")
        value = float(match[2])
        if match[1] in ("forward", "stop") and value <= 0:
            raise ValueError(f"{file_name}: {words!r} must be more than 0.")
        if match[1] == "forward":
            heading = np.deg2rad(heading_deg)
            place = place + value * np.array([np.sin(heading), np.cos(heading)])
            along_m += value
            corners.append(place)
        elif match[1] == "stop":
            looks.append((along_m, value, 0.0))
        elif match[1] == "look":
            looks.append((along_m, float(match[3]), value))
        else:
            heading_deg += value if match[1] == "right" else -value
    if len(corners) < 2:
        raise ValueError(f"{file_name} goes nowhere; {USAGE}.")
    return corners, looks


def look_around(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    looks: Float64[np.ndarray, "L 3"],
    spacing_m: float,
    fps: float,
) -> Float64[np.ndarray, "_ 4 4"]:
    """Let the camera stand and turn along a path walked at a spacing.

    Rounded corners make a path shorter than its corners are apart, so that it stands
    up to a metre or two behind a place that follows a turn.
    """
    places = np.minimum(np.rint(looks[:, 0] / spacing_m), len(ecef_from_camera) - 1)
    frames, yaw_deg, turned = [], [], 0.0
    begin = 0
    for place, (_, seconds, degrees) in zip(places.astype(int), looks, strict=True):
        moving = np.arange(begin, place + 1)
        standing = max(1, round(seconds * fps))
        frames += [moving, np.full(standing, place)]
        yaw_deg += [np.full(len(moving), turned)]
        yaw_deg += [turned + degrees * np.arange(1, standing + 1) / standing]
        turned, begin = turned + degrees, place + 1
    rest = np.arange(begin, len(ecef_from_camera))
    frames, yaw_deg = [*frames, rest], [*yaw_deg, np.full(len(rest), turned)]
    yaw_rad = np.deg2rad(np.concatenate(yaw_deg))
    return ecef_from_camera[np.concatenate(frames)] @ yaw_rotation(yaw_rad)
