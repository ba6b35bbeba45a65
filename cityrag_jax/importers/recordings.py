"""From pictures with places and times to the drives of a city.

A recording is what a person made: pictures in folders, with gaps, standing still,
twice as dense as wanted, without headings or heights. Here it becomes columns of
captures in drives, and a report of what was done to it. Degrees, metres, Unix seconds;
NaN is unknown. Nothing here reads a file.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64

from cityrag_jax.data.captures import Captures
from cityrag_jax.geo.ecef import ecef_from_enu, ecef_from_geodetic
from cityrag_jax.geo.neighbourhoods import cluster_places
from cityrag_jax.geo.poses import poses_from_geodetic

COURSE_M = 3.0  # before and behind: places are known to about a metre
MOVED_M = 1.0  # a shorter drive has no course
COARSE = 2.0  # times the wanted spacing, more is refused


@dataclasses.dataclass(frozen=True)
class Origin:
    """Whose a picture is. `link` is where a person finds it at its source, `id` what
    it is called there; without one it is known by its path."""

    licence: str
    attribution: str
    anonymised: bool = False
    link: str = ""
    accuracy_m: float = math.nan
    id: str = ""


@dataclasses.dataclass(frozen=True)
class Shots:
    """Pictures as they were taken, one row each, in any order.

    `names` are paths within the recording; a folder is not joined to another one.
    """

    names: tuple[str, ...]
    time_s: Float64[np.ndarray, " N"]
    latitude_deg: Float64[np.ndarray, " N"]
    longitude_deg: Float64[np.ndarray, " N"]
    height_m: Float64[np.ndarray, " N"]
    heading_deg: Float64[np.ndarray, " N"]
    pitch_deg: Float64[np.ndarray, " N"]
    roll_deg: Float64[np.ndarray, " N"]
    origins: tuple[Origin, ...]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: Int64[np.ndarray, " _"]) -> "Shots":
        """Take rows in an order."""
        columns = {name: getattr(self, name)[rows] for name in COLUMNS}
        names = tuple(self.names[k] for k in rows.tolist())
        origins = tuple(self.origins[k] for k in rows.tolist())
        return Shots(names, **columns, origins=origins)


COLUMNS = tuple(f.name for f in dataclasses.fields(Shots)[1:-1])


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How a recording is cut into drives.

    A drive ends where the next picture is `gap_s` later or `gap_m` away. Of pictures
    nearer to each other than `spacing_m` one is kept, 0 keeps all. `headings` are
    the pictures' own ("given", and of the course where there is none), or the course's
    for all; to either the camera's mount is added, found from the given ones, or
    `mount_deg` to the right of the course. `declination_deg` is added to given ones.
    """

    gap_s: float = 300.0
    gap_m: float = 30.0
    spacing_m: float = 0.0
    headings: str = "given"
    mount_deg: float | None = None
    declination_deg: float = 0.0
    neighbourhoods: int | None = None


HEADINGS = ("given", "course")


def make_captures(
    shots: Shots, cuts: Cuts
) -> tuple[Captures, Int64[np.ndarray, " n"], dict[str, Any]]:
    """Give the captures of a recording, the shot of each, and what was done to them.

    Raises ValueError if nothing of it can be used.
    """
    order, ordered, place_m, drive = cut_drives(shots, cuts)
    kept = np.flatnonzero(_thinned(place_m, drive, cuts.spacing_m))
    skipped = _names(ordered, np.setdiff1d(np.arange(len(drive)), kept))
    dropped = {f"nearer than {cuts.spacing_m:g} m to the one before": skipped}
    heading, facts = _headings(ordered, place_m, drive, kept, cuts)
    alone = np.isnan(heading)
    dropped["no heading, and no drive that has a course"] = _names(ordered, kept[alone])
    kept, heading = kept[~alone], heading[~alone]
    if len(kept) == 0:
        raise ValueError(
            f"None of {len(shots)} pictures can be given a heading: they neither have "
            "one nor belong to a drive that moves (--gap-m, --gap-s)."
        )
    _check_spacing(facts, cuts.spacing_m)
    used = ordered.select(kept)
    height_m, heights = _heights(used, drive[kept])
    _, numbers = np.unique(drive[kept], return_inverse=True)
    _, licence = tabulate([origin.licence for origin in used.origins])
    _, attribution = tabulate([origin.attribution for origin in used.origins])
    captures = Captures(
        ecef_from_camera=poses_from_geodetic(
            used.latitude_deg, used.longitude_deg, height_m, heading
        ),
        time_s=used.time_s,
        drive=numbers.astype(np.int32),
        neighbourhood=cluster_places(place_m[kept], cuts.neighbourhoods),
        licence=licence,
        attribution=attribution,
        anonymised=np.array([origin.anonymised for origin in used.origins]),
    )
    report = {
        "captures": len(kept),
        "drives": len(np.unique(numbers)),
        "heights": heights,
        "by_drive": facts,
        "skipped": {reason: names for reason, names in dropped.items() if names},
    }
    return captures, order[kept], report


def cut_drives(
    shots: Shots, cuts: Cuts
) -> tuple[Int64[np.ndarray, " N"], Shots, Float64[np.ndarray, "N 3"], np.ndarray]:
    """Give an order of shots, the shots in it, their places on the map in metres, and
    the number of each one's drive."""
    order = _in_order(shots)
    ordered = shots.select(order)
    place_m = _places(ordered)
    return order, ordered, place_m, _cut(ordered, place_m, cuts)


def tabulate(words: Sequence[str]) -> tuple[tuple[str, ...], Int32[np.ndarray, " N"]]:
    """Give each word once, in order, and the row of each."""
    table, rows = np.unique(np.array(words), return_inverse=True)
    return tuple(table.tolist()), rows.astype(np.int32)


def _names(shots: Shots, rows: np.ndarray) -> list[str]:
    return [shots.names[k] for k in rows.tolist()]


def _in_order(shots: Shots) -> Int64[np.ndarray, " N"]:
    folders = [name.rpartition("/")[0] for name in shots.names]
    keys = zip(folders, shots.time_s.tolist(), shots.names, strict=True)
    return np.array([k for k, _ in sorted(enumerate(keys), key=lambda x: x[1])], int)


def _places(shots: Shots) -> Float64[np.ndarray, "N 3"]:
    """Give places in metres east and north of the middle one; up is left out."""
    middle = float(np.median(shots.latitude_deg)), float(np.median(shots.longitude_deg))
    enu = ecef_from_enu(*middle, 0.0)
    ground = np.zeros(len(shots))
    ecef = ecef_from_geodetic(shots.latitude_deg, shots.longitude_deg, ground)
    place_m = (ecef - enu[:3, 3]) @ enu[:3, :3]
    place_m[:, 2] = 0
    return place_m


def _cut(shots: Shots, place_m, cuts: Cuts) -> Int64[np.ndarray, " N"]:
    """Number the drives."""
    folders = np.array([name.rpartition("/")[0] for name in shots.names])
    ends = folders[1:] != folders[:-1]
    ends |= np.diff(shots.time_s) > cuts.gap_s
    ends |= np.linalg.norm(np.diff(place_m, axis=0), axis=1) > cuts.gap_m
    return np.concatenate([[0], np.cumsum(ends)])


def _thinned(place_m, drive, spacing_m: float) -> np.ndarray:
    """Say which pictures to keep: each `spacing_m` or more from the one kept before.

    A hundredth less is enough: driven at that very spacing, all are kept.
    """
    kept = np.ones(len(drive), bool)
    if spacing_m <= 0:
        return kept
    last = 0
    for k in range(1, len(drive)):
        near = np.linalg.norm(place_m[k] - place_m[last]) < 0.99 * spacing_m
        kept[k] = drive[k] != drive[last] or not near
        last = k if kept[k] else last
    return kept


def _headings(shots, place_m, drive, kept, cuts: Cuts):
    """Give headings of the kept pictures, NaN where unknown, and facts of drives."""
    heading, facts = np.full(len(kept), np.nan), []
    begins = np.flatnonzero(np.diff(drive[kept])) + 1
    for rows in np.split(np.arange(len(kept)), begins):
        shot = kept[rows]
        given = shots.heading_deg[shot] + cuts.declination_deg
        course, steps_m = find_course(place_m[shot])
        mount, spread = find_mount(given, course)
        asked = cuts.mount_deg if cuts.mount_deg is not None else mount
        followed = course + (0.0 if asked is None else asked)
        heading[rows] = followed
        if cuts.headings == "given":
            heading[rows] = np.where(np.isnan(given), followed, given)
        moving_m = steps_m[steps_m > 0.05]
        facts.append(
            {
                "folder": shots.names[shot[0]].rpartition("/")[0],
                "first": shots.names[shot[0]].rpartition("/")[2],
                "captures": len(rows),
                "metres": round(float(steps_m.sum()), 1),
                "spacing_m": round(float(np.median(moving_m)), 2)
                if len(moving_m)
                else None,
                "headings_given": int(np.sum(~np.isnan(given))),
                "mount_deg": mount,
                "mount_spread_deg": spread,
            }
        )
    return np.remainder(heading, 360), facts


def find_course(
    place_m: Float64[np.ndarray, "n 3"],
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " _"]]:
    """Give the course along a drive, degrees from north, and its steps in metres.

    From the place `COURSE_M` behind to that ahead, along the way; NaN for a drive that
    does not move.
    """
    steps_m = np.linalg.norm(np.diff(place_m, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps_m)])
    if along[-1] < MOVED_M:
        return np.full(len(place_m), np.nan), steps_m
    # Standing pictures share a place along the way; interpolation needs it once.
    way, first = np.unique(along, return_index=True)
    ends = np.clip([along - COURSE_M, along + COURSE_M], 0, along[-1])
    behind, ahead = (
        np.stack([np.interp(end, way, place_m[first, k]) for k in range(2)], -1)
        for end in ends
    )
    east, north = (ahead - behind).T
    return np.rad2deg(np.arctan2(east, north)), steps_m


def find_mount(given_deg, course_deg) -> tuple[float | None, float | None]:
    """Give the circular median of heading less course, and half its quartiles' width.

    What a camera is turned by on its mount, and how well the headings agree on it.
    """
    turned = np.deg2rad(given_deg - course_deg)
    turned = turned[~np.isnan(turned)]
    if len(turned) == 0:
        return None, None
    mean = np.angle(np.mean(np.exp(1j * turned)))
    off = np.angle(np.exp(1j * (turned - mean)))
    middle = np.angle(np.exp(1j * (mean + np.median(off))))
    low, high = np.percentile(off, (25, 75))
    return round(float(np.rad2deg(middle)), 1), round(
        float(np.rad2deg(high - low)) / 2, 1
    )


def _heights(shots: Shots, drive) -> tuple[np.ndarray, str]:
    """Fill unknown heights from the drive's own others, or else from the city's."""
    height_m = shots.height_m.copy()
    unknown = np.isnan(height_m)
    if unknown.all():
        return np.zeros(len(height_m)), "unknown: all are taken for 0 m"
    if not unknown.any():
        return height_m, "of all pictures"
    middle = float(np.median(height_m[~unknown]))
    for number in np.unique(drive):
        rows = np.flatnonzero(drive == number)
        known = rows[~unknown[rows]]
        height_m[rows] = middle
        if len(known):
            height_m[rows] = np.interp(rows, known, shots.height_m[known])
    return height_m, f"filled for {int(unknown.sum())} of {len(height_m)} pictures"


def _check_spacing(facts: list[dict], spacing_m: float) -> None:
    spacings = collections.Counter()
    for drive in facts:
        spacings[drive["spacing_m"] or 0.0] += drive["captures"]
    ordered = np.repeat(*map(np.array, zip(*sorted(spacings.items()), strict=True)))
    median = float(np.median(ordered))
    if spacing_m and median > COARSE * spacing_m:
        raise ValueError(
            f"The pictures are {median:g} m apart, wider than the {spacing_m:g} m "
            "wanted, and cannot be made denser: raise --spacing-m, or leave it out."
        )
