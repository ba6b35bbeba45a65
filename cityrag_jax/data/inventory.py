"""What a city holds, in figures: drives, spacing, headings, heights, pairs, licences.

Nothing here reads a picture. Distances are metres, headings degrees at the surface.
"""

import collections
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from cityrag_jax.data.pairs import PairConfig, Pairs
from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import drop_to_ellipsoid, ecef_from_enu
from cityrag_jax.geo.retrieval import drive_edges
from cityrag_jax.geo.revisits import Revisits, find_revisits
from cityrag_jax.geo.trajectory import headings

STANDING_M = 0.05  # a smaller step is none
GAP_M = 20.0  # a longer step is a gap
NEIGHBOUR_M = 5.0  # the mean distance of a pair (section 3.1)
SAMPLES = 5000  # captures that stand for all where each costs a search


def count_city(city: City, pairs: Pairs | None) -> dict[str, Any]:
    """Give all figures of a city, ready for JSON."""
    drives = [drive_facts(city, *edge) for edge in _edges(city)]
    steps_m = _steps(city)
    moving_m = steps_m[steps_m > STANDING_M]
    time_s = city.captures.time_s
    facts = {
        "city": city.name,
        "captures": len(city),
        "drives": len(drives),
        "kilometres": round(sum(d["metres"] for d in drives) / 1000, 3),
        "first_day": _day(time_s.min()),
        "last_day": _day(time_s.max()),
        "spacing_m": _spread(moving_m),
        "standing_share": _share(steps_m <= STANDING_M),
        "gaps": int(np.sum(steps_m > GAP_M)),
        "height_m": _spread(city.index.height_m),
        "seen_twice_share": share_seen_twice(city),
        "neighbourhoods": len(np.unique(city.captures.neighbourhood)),
        "sources": count_sources(city, np.arange(len(city))),
        "not_anonymised": int(np.sum(~city.captures.anonymised)),
    }
    if pairs is not None:
        facts["pairs"] = len(pairs)
        facts["pairs_to_train"] = len(pairs.training)
        facts["pairs_held_out"] = len(pairs.evaluation)
        held = pairs.neighbourhood[pairs.held_out]
        facts["held_out_neighbourhoods"] = np.unique(held).tolist()
    facts["by_drive"] = drives
    return facts


def driven_spacing_m(city: City) -> tuple[float, float]:
    """Give how far moving cameras of the city went between captures: 1 % and 99 %.

    Raises ValueError for a city in which nothing moves.
    """
    steps_m = _steps(city)
    moving_m = steps_m[steps_m > STANDING_M]
    if len(moving_m) == 0:
        raise ValueError(f"{city.folder}: no drive moves; rebuild the city.")
    low, high = np.percentile(moving_m, (1, 99)).tolist()
    return low, high


def drive_facts(city: City, start: int, stop: int) -> dict[str, Any]:
    """Give the figures of one drive.

    `mount_deg` is the middle of heading less course: 0 where the panorama's centre
    looks along the street; None where the drive stands.
    """
    columns, index = city.captures, city.index
    chosen = slice(start, stop)
    place_m = index.tree.data[chosen]
    steps_m = np.linalg.norm(np.diff(place_m, axis=0), axis=1)
    moving_m = steps_m[(steps_m > STANDING_M) & (steps_m <= GAP_M)]
    return {
        "drive": int(columns.drive[start]),
        "day": _day(columns.time_s[start]),
        "captures": stop - start,
        "metres": round(float(steps_m[steps_m <= GAP_M].sum()), 1),
        "spacing_m": round(float(np.median(moving_m)), 2) if len(moving_m) else None,
        "height_m": round(float(np.median(index.height_m[chosen])), 1),
        "mount_deg": mount_offset(columns.ecef_from_camera[chosen]),
        "gaps": int(np.sum(steps_m > GAP_M)),
    }


def mount_offset(ecef_from_camera: Float64[np.ndarray, "n 4 4"]) -> float | None:
    """Give the circular median of heading less course, in degrees to the right."""
    place_m = ecef_from_camera[:, :3, 3]
    far = len(place_m) > 1 and np.linalg.norm(place_m[-1] - place_m[0])
    ahead = np.gradient(place_m, axis=0) if len(place_m) > 1 else place_m * 0
    moving = np.linalg.norm(ahead, axis=1) > STANDING_M
    if not moving.any() or not far:
        return None
    course = ecef_from_camera[moving].copy()
    course[:, :3, 2] = ahead[moving]
    turned = headings(ecef_from_camera[moving]) - headings(course)
    mean = np.angle(np.mean(np.exp(1j * turned)))
    middle = mean + np.median(np.angle(np.exp(1j * (turned - mean))))
    return round(float(np.rad2deg(np.angle(np.exp(1j * middle)))), 1)


def share_seen_twice(city: City, gap_s: float = PairConfig.min_gap_s) -> float:
    """Give the share of places with a capture of another drive and time nearby."""
    columns, index = city.captures, city.index
    some = np.unique(np.linspace(0, len(city) - 1, SAMPLES).astype(np.int64))
    near = index.tree.query_ball_point(index.tree.data[some], NEIGHBOUR_M)
    twice = [
        np.any(
            (columns.drive[found] != columns.drive[capture])
            & (np.abs(columns.time_s[found] - columns.time_s[capture]) >= gap_s)
        )
        for capture, found in zip(some, near, strict=True)
    ]
    return _share(np.array(twice))


def find_streets(city: City) -> Revisits:
    """Give the city's streets, and at how many times each was driven."""
    columns = city.captures
    gap_s = PairConfig.min_gap_s
    return find_revisits(
        city.index.tree.data, columns.drive, columns.time_s, gap_s=gap_s
    )


def count_streets(city: City, found: Revisits) -> dict[str, Any]:
    """Say how long the streets are, and how much of them lacks a second time.

    A street that was driven at two times can be trained on; one that was driven once
    needs one more pass, along it or against it.
    """
    where = city.captures.neighbourhood[found.row]
    twice = found.times > 1
    parts = {int(k): where == k for k in np.unique(where)}
    lacking_km = {k: found.metres(part & ~twice) / 1000 for k, part in parts.items()}
    return {
        "kilometres": round(found.metres() / 1000, 3),
        "at_two_times_km": round(found.metres(twice) / 1000, 3),
        "lacking_a_pass_km": round(found.metres(~twice) / 1000, 3),
        "lacking_by_neighbourhood_km": {
            str(k): round(v, 3) for k, v in lacking_km.items() if v > 0
        },
    }


def count_sources(city: City, captures: Int64[np.ndarray, " n"]) -> list[dict]:
    """Count captures by licence, attribution and anonymisation."""
    columns, header = city.captures, city.header
    kinds = zip(
        columns.licence[captures].tolist(),
        columns.attribution[captures].tolist(),
        columns.anonymised[captures].tolist(),
        strict=True,
    )
    return [
        {
            "licence": header.licences[licence],
            "attribution": header.attributions[attribution],
            "anonymised": anonymised,
            "captures": count,
        }
        for (licence, attribution, anonymised), count in sorted(
            collections.Counter(kinds).items()
        )
    ]


def find_doubts(facts: dict[str, Any]) -> list[str]:
    """Say what a person should look at before training on a city."""
    doubts, drives = [], facts["by_drive"]
    turned = [d for d in drives if d["mount_deg"] and abs(d["mount_deg"]) > 20]
    if turned:
        worst = max(turned, key=lambda d: abs(d["mount_deg"]))
        doubts.append(
            f"{len(turned)} of {len(drives)} drives look {worst['mount_deg']} degrees "
            f"or less beside their course (drive {worst['drive']}): was the camera "
            "mounted so, or are headings magnetic, or taken of another axis?"
        )
    spacing_m = facts["spacing_m"]["median"]
    if spacing_m > 1.5:
        doubts.append(
            f"captures are {spacing_m} m apart; the method's come at 10 a second, half "
            "a metre to a metre: a clip of training covers a longer way than one of "
            "generation."
        )
    if facts["gaps"]:
        doubts.append(
            f"{facts['gaps']} steps within drives are longer than {GAP_M:g} m; split "
            "drives there."
        )
    if facts["seen_twice_share"] < 0.5:
        doubts.append(
            f"only {facts['seen_twice_share']:.0%} of the places were captured by two "
            "drives at different times; training needs a second pass of the others."
        )
    if facts["neighbourhoods"] == 1 and not facts.get("pairs_held_out"):
        doubts.append(
            "all captures have one neighbourhood: nothing can be held out for "
            "evaluation."
        )
    if facts["not_anonymised"]:
        doubts.append(
            f"{facts['not_anonymised']} captures are not anonymised: people and plates "
            "may be recognised in whatever is made of them."
        )
    return doubts


def east_north(
    city: City, position_m: Float64[np.ndarray, "n 3"]
) -> Float64[np.ndarray, "n 2"]:
    """Give places in metres east and north of the city's anchor."""
    enu = ecef_from_enu(city.header.anchor[0], city.header.anchor[1], 0.0)
    below_m, _ = drop_to_ellipsoid(position_m)
    return (below_m - enu[:3, 3]) @ enu[:3, :2]


def _edges(city: City) -> list[tuple[int, int]]:
    edges = drive_edges(city.captures.drive).tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def _steps(city: City) -> Float64[np.ndarray, " _"]:
    steps_m = np.linalg.norm(np.diff(city.index.tree.data, axis=0), axis=1)
    inside = np.diff(city.captures.drive) == 0
    return steps_m[inside] if inside.any() else np.zeros(1)


def _spread(values: np.ndarray) -> dict[str, float]:
    shares = {"least": 0, "median": 50, "percentile_95": 95, "most": 100}
    if len(values) == 0:
        return dict.fromkeys(shares, 0.0)
    return {n: round(float(np.percentile(values, q)), 2) for n, q in shares.items()}


def _share(which: np.ndarray) -> float:
    return round(float(np.mean(which)), 4)


def _day(time_s: float) -> str:
    return str(np.datetime64(int(time_s), "s").astype("datetime64[D]"))
