"""Districts that somebody drew: polygons of GeoJSON (RFC 7946), longitude first."""

import json
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int32

Ring = Float64[np.ndarray, "V 2"]
Places = Float64[np.ndarray, " N"]


def number_districts(
    text: str, file_name: str, latitude_deg: Places, longitude_deg: Places
) -> Int32[np.ndarray, " N"]:
    """Give places the number of the district that they lie in, by the file's order.

    Where districts overlap the first one counts; what lies in none has the number
    behind the last. Raises ValueError for a file without polygons, and for one in which
    no place lies.
    """
    districts = list(_districts(read_features(text, file_name), file_name))
    if not districts:
        raise ValueError(f"{file_name} holds no Polygon; draw districts as polygons.")
    place = np.stack([longitude_deg, latitude_deg], -1)
    number = np.full(len(place), len(districts), np.int32)
    for k in reversed(range(len(districts))):
        number[within(place, districts[k])] = k
    if (number == len(districts)).all():
        middle = np.median(place, axis=0)
        raise ValueError(
            f"None of {len(districts)} districts in {file_name} holds a capture, which "
            f"lie around [{middle[0]:.5f}, {middle[1]:.5f}]; GeoJSON puts longitude "
            "first."
        )
    return number


def read_features(text: str, file_name: str) -> list[dict]:
    """Read the features of a GeoJSON document, whatever it is."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file_name} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file_name} is no GeoJSON object.")
    features = document.get("features", [document])
    return [f for f in features if isinstance(f, dict)] if features else []


def _districts(features: list[dict], file_name: str) -> Iterator[list[Ring]]:
    """Give the rings of each feature: outlines and holes."""
    for number, feature in enumerate(features, 1):
        shape = feature.get("geometry", feature) or {}
        kind, inside = shape.get("type"), shape.get("coordinates")
        if kind not in ("Polygon", "MultiPolygon"):
            continue
        try:
            polygons = [inside] if kind == "Polygon" else inside
            rings = [ring for polygon in polygons for ring in polygon]
            yield [np.array([p[:2] for p in ring], float) for ring in rings]
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{file_name}: the coordinates of feature {number} are no {kind} "
                f"({error})."
            ) from error


def within(
    place: Float64[np.ndarray, "N 2"], rings: list[Ring]
) -> Bool[np.ndarray, " N"]:
    """Say which places lie inside: a ray to the east crosses rings an odd time."""
    inside = np.zeros(len(place), bool)
    low = np.min([ring.min(0) for ring in rings], axis=0)
    high = np.max([ring.max(0) for ring in rings], axis=0)
    near = np.flatnonzero(((place >= low) & (place <= high)).all(1))
    x, y = place[near].T
    odd = np.zeros(len(near), bool)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y0 != y1:
                crosses = (y0 <= y) != (y1 <= y)
                odd ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    inside[near] = odd
    return inside
