"""Mapillary: street pictures of the whole world, many streets many times, CC-BY-SA.

API v4 (mapillary.com/developer/api-documentation): GET graph.mapillary.com/images with
`bbox`, `is_pano`, `limit` (at most 2000) and `fields`, and /ID?fields= for one image.
The user's token goes in the Authorization header, of the API alone, and into no file.
A box must be "smaller than 0.01 degrees square": ours have shorter sides than that,
which is so however it is read. Addresses of pictures expire; they are asked for again.

`computed_` fields are those of structure from motion: computed_rotation is OpenSfM's
(doc/source/geometry.rst), the angle-axis vector of camera from world, with the camera's
axes as ours and the world's east, north and up. They agree within one `merge_cc`, a
connected piece of the reconstruction, and may lie off another's by metres.
"""

import collections
import dataclasses
import math
import os
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from cityrag_jax.geo.ecef import ecef_from_enu, ecef_from_geodetic, geodetic_from_ecef
from cityrag_jax.importers.listing import Box, Item, Service, Skipped, cut_box, inside
from cityrag_jax.importers.web import Client, Refused, Unreachable

API = "https://graph.mapillary.com"
TOKEN = "MAPILLARY_ACCESS_TOKEN"
LICENCE = "CC-BY-SA-4.0"
AREA_DEG, LEAST_DEG = 0.009, 1e-5  # a metre: what stands still may be cut short
PAGE = 2000  # images an answer, the most
FEWEST = 5  # pictures that tell how a group lies
FIELDS = (
    "id,sequence,captured_at,is_pano,camera_type,geometry,computed_geometry,altitude,"
    "computed_altitude,compass_angle,computed_compass_angle,computed_rotation,merge_cc,"
    "creator,thumb_original_url"
)
SPHERES = ("spherical", "equirectangular")
GROUPS = ("aligned", "apart")


def open_mapillary(client: Client, box: Box, *, api: str = API) -> Service:
    """Give a service of the panoramas in a box; the token is the environment's."""
    token, api = os.environ.get(TOKEN, "").strip(), api.rstrip("/")
    if not token:
        raise ValueError(
            f"{TOKEN} is not set: make a token of your own at "
            "mapillary.com/dashboard/developers and export it in this shell."
        )
    headers = {"Authorization": f"OAuth {token}"}

    def ask(url: str, **query: Any) -> dict[str, Any]:
        try:
            return client.read_json(url, headers, **query)
        except Refused as error:
            if error.status in (401, 403) or "OAuthException" in error.body:
                raise ValueError(
                    f"Mapillary refuses the token in {TOKEN} (status {error.status}): "
                    "make a new one at mapillary.com/dashboard/developers."
                ) from error
            raise

    def list_area(area: list[float], skipped: Skipped) -> list[Item]:
        items = []
        for document in _search(ask, api, tuple(area)):
            read = read_image(document)
            if not isinstance(read, Item):
                skipped[read].append(str(document.get("id")))
            elif inside(box, read.latitude_deg, read.longitude_deg):
                items.append(read)
        return items

    def renew(item: Item) -> str | None:
        url = ask(f"{api}/{item.id}", fields="thumb_original_url")
        return url.get("thumb_original_url")

    question = {"service": "mapillary", "api": api, "bbox": list(box)}
    areas = [list(part) for part in cut_box(box, AREA_DEG)]
    return Service(question, areas, list_area, renew)


def _search(ask, api: str, box: Box) -> list[dict[str, Any]]:
    """Ask for the images of a box, in four where there are too many for one answer."""
    query = {"bbox": ",".join(f"{x:.7f}" for x in box), "limit": PAGE}
    side_deg = max(box[2] - box[0], box[3] - box[1])
    try:
        document = ask(f"{api}/images", is_pano="true", fields=FIELDS, **query)
    except Unreachable:  # it says 500 and "reduce the amount of data" of crowded boxes
        if side_deg < AREA_DEG / 4:
            raise
        document = {"data": [{}] * PAGE}
    found = document.get("data")
    if not isinstance(found, list):
        raise ValueError(f"{api}/images answers {sorted(document)} and no data.")
    if len(found) < PAGE or side_deg < LEAST_DEG:
        return [image for image in found if isinstance(image, dict)]
    parts = cut_box(box, side_deg / 2)
    return [image for part in parts for image in _search(ask, api, part)]


def read_image(document: dict) -> Item | str:
    """Read an image; give the reason where it cannot be used."""
    if not document.get("is_pano") or document.get("camera_type") not in SPHERES:
        return "not a panorama of 360 degrees"
    gps = _place(document.get("geometry"))
    place = _place(document.get("computed_geometry")) or gps
    url, name = document.get("thumb_original_url"), str(document.get("id"))
    time_s = _number(document.get("captured_at")) / 1000
    if place is None:
        return "no place"
    if math.isnan(time_s):
        return "no time of capture"
    if not url:
        return "no address of the picture (thumb_original_url)"
    creator = (document.get("creator") or {}).get("username") or "unknown"
    merged = document.get("merge_cc")
    computed = document.get("computed_geometry") and merged is not None
    return Item(
        id=name,
        sequence=str(document.get("sequence")),
        url=str(url),
        link=f"https://www.mapillary.com/app/?pKey={name}",
        licence=LICENCE,
        attribution=f"{creator} via Mapillary",
        anonymised=True,  # faces and plates are blurred before pictures are shown
        time_s=time_s,
        latitude_deg=place[0],
        longitude_deg=place[1],
        height_m=_first(document, "computed_altitude", "altitude"),
        group=str(merged) if computed else "",
        gps_latitude_deg=gps[0] if gps else math.nan,
        gps_longitude_deg=gps[1] if gps else math.nan,
        **_attitude(document),
    )


def _attitude(document: dict) -> dict[str, float]:
    rotation = document.get("computed_rotation")
    if isinstance(rotation, list) and len(rotation) == 3:
        camera_from_enu = Rotation.from_rotvec([_number(x) for x in rotation])
        return attitude_of(camera_from_enu.inv().as_matrix())
    heading_deg = _first(document, "computed_compass_angle", "compass_angle")
    return {"heading_deg": heading_deg}


def attitude_of(enu_from_camera: np.ndarray) -> dict[str, float]:
    """Give heading, pitch and roll of a camera, as GPano has them."""
    right, ahead = enu_from_camera[:, 0], enu_from_camera[:, 2]
    level = math.hypot(ahead[0], ahead[1])
    # Rolled by 0 the right side is level, and what is below it lies along `down`.
    flat = np.array([ahead[1], -ahead[0], 0.0]) / max(level, 1e-12)
    down = np.cross(ahead, flat)
    return {
        "heading_deg": math.degrees(math.atan2(ahead[0], ahead[1])) % 360,
        "pitch_deg": math.degrees(math.atan2(ahead[2], level)),
        "roll_deg": math.degrees(math.atan2(right @ down, right @ flat)),
    }


def _place(geometry: Any) -> tuple[float, float] | None:
    coordinates = (geometry or {}).get("coordinates")
    if not isinstance(coordinates, list) or len(coordinates) < 2:
        return None
    longitude_deg, latitude_deg = map(_number, coordinates[:2])
    if not (abs(latitude_deg) <= 90 and abs(longitude_deg) <= 180):
        return None
    return latitude_deg, longitude_deg


def _first(document: dict, *names: str) -> float:
    numbers = [_number(document.get(name)) for name in names]
    return next((x for x in numbers if not math.isnan(x)), math.nan)


def _number(value: Any) -> float:
    good = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if good else math.nan


def align_groups(items: list[Item]) -> tuple[list[Item], list[str]]:
    """Move each group as a whole to where its cameras' own places say it lies.

    By the median of its pictures, east and north: satellites err by metres now and
    then, not all to one side. Groups of fewer than `FEWEST` pictures stay.
    """
    rows = collections.defaultdict(list)
    for k, item in enumerate(items):
        if item.group and not math.isnan(item.gps_latitude_deg):
            rows[item.group].append(k)
    moved, notes = list(items), []
    for group, members in sorted(rows.items()):
        if len(members) < FEWEST:
            continue
        computed = _ecef(items, members, "latitude_deg", "longitude_deg")
        gps = _ecef(items, members, "gps_latitude_deg", "gps_longitude_deg")
        first = items[members[0]]
        axes = ecef_from_enu(first.latitude_deg, first.longitude_deg, 0.0)[:3, :3]
        shift_m = np.median((gps - computed) @ axes, axis=0) * (1, 1, 0)
        whole = [k for k, item in enumerate(items) if item.group == group]
        places = _ecef(items, whole, "latitude_deg", "longitude_deg")
        latitude, longitude, _ = geodetic_from_ecef(places + axes @ shift_m)
        for k, place in zip(whole, zip(latitude, longitude, strict=True), strict=True):
            moved[k] = dataclasses.replace(
                items[k], latitude_deg=float(place[0]), longitude_deg=float(place[1])
            )
        notes.append(
            f"{len(whole)} pictures of merge_cc {group} moved {shift_m[0]:.1f} m east "
            f"and {shift_m[1]:.1f} m north, to their satellites' median"
        )
    return moved, notes


def _ecef(items: list[Item], rows: list[int], *names: str) -> np.ndarray:
    latitude, longitude = (
        np.array([getattr(items[k], name) for k in rows]) for name in names
    )
    return ecef_from_geodetic(latitude, longitude, np.zeros(len(rows)))
