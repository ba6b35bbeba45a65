"""What a picture says of itself: size, place, time, attitude, projection.

EXIF 2.32 (GPS directory, DateTimeOriginal) and Google's photo sphere XMP (GPano:
PoseHeadingDegrees is the compass heading of the picture's centre, pitch positive up,
roll positive clockwise). Degrees, metres, Unix seconds; NaN where a picture is silent.
Only the head of a file is read, never its pixels.
"""

import dataclasses
import datetime
import math
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

GPANO = "{http://ns.google.com/photos/1.0/panorama/}"
MOST_PIXELS = 1 << 27  # 16384 x 8192
MOST_XMP = 1 << 20
FILM_DIAGONAL_MM = math.hypot(36, 24)
QUARTER_S, CLOCK_S = 900, 60
TURNED = (5, 6, 7, 8)  # orientations that swap rows and columns

Gps, Base = ExifTags.GPS, ExifTags.Base


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of a full sphere that a picture shows, in pixels of that sphere."""

    full_width: int
    full_height: int
    left: int
    top: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Tags:
    """What is known of a picture. `width` and `height` are those of it upright.

    `time_is_utc` is False where the time zone was not told and UTC is assumed.
    `magnetic` says that the heading is a compass needle's. `fov_deg` is horizontal,
    of a perspective picture.
    """

    width: int
    height: int
    time_s: float = math.nan
    time_is_utc: bool = True
    latitude_deg: float = math.nan
    longitude_deg: float = math.nan
    height_m: float = math.nan
    heading_deg: float = math.nan
    magnetic: bool = False
    pitch_deg: float = math.nan
    roll_deg: float = math.nan
    fov_deg: float = math.nan
    projection: str | None = None
    window: Window | None = None


def read_tags(path: Path) -> Tags:
    """Read the head of a picture; ValueError if it is none, or too large."""
    try:
        # Above 89 million pixels Pillow warns of bombs; what is too large is said here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                exif = picture.getexif()
                gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
                photo = exif.get_ifd(ExifTags.IFD.Exif)
                orientation = exif.get(Base.Orientation, 1)
                xmp = picture.info.get("xmp", b"")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large to decode: {error}") from error
    except Exception as error:  # Pillow's readers raise many kinds
        raise ValueError(f"{path} is not a readable picture ({error}).") from error
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{path} has {width}x{height} pixels, more than {MOST_PIXELS}; make it "
            "smaller."
        )
    if orientation in TURNED:
        width, height = height, width
    known = _read_gps(gps) | _read_gpano(xmp)
    time_s, is_utc = _read_time(photo, gps)
    focal_mm = _number(photo.get(Base.FocalLengthIn35mmFilm))
    if focal_mm > 0:
        # "35 mm" compares diagonals.
        across_mm = FILM_DIAGONAL_MM * width / math.hypot(width, height)
        known["fov_deg"] = math.degrees(2 * math.atan(across_mm / 2 / focal_mm))
    return Tags(width, height, time_s, is_utc, **known)


def _read_gps(gps: dict[int, Any]) -> dict[str, Any]:
    known = {
        "latitude_deg": _angle(gps, Gps.GPSLatitude, Gps.GPSLatitudeRef, "S", 90),
        "longitude_deg": _angle(gps, Gps.GPSLongitude, Gps.GPSLongitudeRef, "W", 180),
        "height_m": _number(gps.get(Gps.GPSAltitude)),
        "heading_deg": _number(gps.get(Gps.GPSImgDirection)),
        "magnetic": str(gps.get(Gps.GPSImgDirectionRef, "T"))[:1] == "M",
    }
    if known["latitude_deg"] == known["longitude_deg"] == 0:  # no satellites yet
        known["latitude_deg"] = known["longitude_deg"] = math.nan
    if gps.get(Gps.GPSAltitudeRef, b"\0") in (b"\1", 1, "1"):
        known["height_m"] *= -1
    if not 0 <= known["heading_deg"] <= 360:
        known["heading_deg"] = math.nan
    return known


def _angle(gps, name, reference, negative, most) -> float:
    """Read degrees, minutes and seconds as degrees."""
    parts = gps.get(name)
    if not isinstance(parts, tuple | list) or not 1 <= len(parts) <= 3:
        return math.nan
    value = sum(_number(x) / 60**k for k, x in enumerate(parts))
    if str(gps.get(reference, "")).upper().startswith(negative):
        value = -value
    return value if abs(value) <= most else math.nan


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _read_time(photo: dict[int, Any], gps: dict[int, Any]) -> tuple[float, bool]:
    """Give Unix time, and whether its zone is known.

    The camera's clock has fractions of a second, the satellites' has the zone: where
    the camera does not tell it, it is their difference in whole quarters of an hour.
    """
    local = _date(photo.get(Base.DateTimeOriginal))
    fraction = str(photo.get(Base.SubsecTimeOriginal, "")).strip("\0 ")
    if fraction.isdigit():
        local += float(f"0.{fraction}")
    zone = str(photo.get(Base.OffsetTimeOriginal, ""))
    if len(zone) >= 6 and zone[0] in "+-" and (zone[1:3] + zone[4:6]).isdigit():
        east_s = 3600 * int(zone[1:3]) + 60 * int(zone[4:6])
        if not math.isnan(local):
            return local - (east_s if zone[0] == "+" else -east_s), True
    clock = gps.get(Gps.GPSTimeStamp)
    satellites = _date(f"{gps.get(Gps.GPSDateStamp)} 00:00:00")
    if isinstance(clock, tuple | list) and len(clock) == 3:
        satellites += sum(_number(x) * 3600 / 60**k for k, x in enumerate(clock))
        if not math.isnan(satellites):
            apart = local - satellites
            if math.isnan(apart):
                return satellites, True
            east_s = round(apart / QUARTER_S) * QUARTER_S
            near = abs(apart - east_s) < CLOCK_S
            return (local - east_s if near else satellites), True
    return local, False


def _date(text: Any) -> float:
    try:
        moment = datetime.datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return math.nan
    return moment.replace(tzinfo=datetime.UTC).timestamp()


def _read_gpano(xmp: bytes | str) -> dict[str, Any]:
    """Read GPano's properties, be they attributes or elements of the XMP packet."""
    content = xmp.encode() if isinstance(xmp, str) else xmp
    if not content or len(content) > MOST_XMP:
        return {}
    try:
        root = ElementTree.fromstring(content.strip(b"\0 \n\r\t"))
    except ElementTree.ParseError:
        return {}
    told: dict[str, str] = {}
    for element in root.iter():
        told |= {k: v for k, v in element.attrib.items() if k.startswith(GPANO)}
        if element.tag.startswith(GPANO) and element.text:
            told[element.tag] = element.text
    told = {name.removeprefix(GPANO): value.strip() for name, value in told.items()}
    known: dict[str, Any] = {"projection": told.get("ProjectionType", "").lower()}
    for name in ("Heading", "Pitch", "Roll"):
        value = _number(told.get(f"Pose{name}Degrees"))
        if not math.isnan(value):
            known[f"{name.lower()}_deg"] = value
            if name == "Heading":
                known["magnetic"] = False  # GPano's is true
    names = [f"FullPano{side}Pixels" for side in ("Width", "Height")]
    kinds = ("Left", "Top", "ImageWidth", "ImageHeight")
    names += [f"CroppedArea{kind}Pixels" for kind in kinds]
    sizes = [_number(told.get(name)) for name in names]
    if all(size >= 0 for size in sizes):
        known["window"] = Window(*map(int, sizes))
    known["projection"] = known["projection"] or None
    return known
