"""From a match to the views that ground a clip: captures, and where each faces.

Two ways to choose them (section 3.2 and appendix B). *By distance*: one capture for
each pose of the path, the nearest on the pass that shows it, so that the condition
moves as the video shall. *As driven*: the captures of the matched passes one after the
other, at the drives' own speed and with their stops, as in training. Either way a
capture faces as the path does where it stands, in the whole path, not in one clip's.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from cityrag_jax.geo.ecef import (
    drop_to_ellipsoid,
    ecef_from_geodetic,
    geodetic_from_ecef,
    invert_rigid,
)
from cityrag_jax.geo.matching import Costs, Match, match_path
from cityrag_jax.geo.retrieval import CaptureIndex, drive_stop
from cityrag_jax.geo.trajectory import headings

WAYS = ("by-distance", "as-driven")
GAPS = ("refuse", "without-geo")
SHORT_GAP_M = 10.0  # no stretch that is shorter is refused


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """How captures are found for a path, and what becomes of stretches without any."""

    way: str = WAYS[0]
    gaps: str = GAPS[0]
    radius_m: float = Costs.radius_m

    def __post_init__(self):
        for name, given, known in (("way", self.way, WAYS), ("gaps", self.gaps, GAPS)):
            if given not in known:
                raise ValueError(
                    f"Retrieval {name} is {given!r}; choose one of {', '.join(known)}."
                )
        if not self.radius_m > 0:
            raise ValueError(
                f"sample.radius_m is {self.radius_m}; captures are looked for within "
                "metres above 0."
            )


@dataclasses.dataclass(frozen=True)
class Views:
    """Captures of other drives, the heading that each faces, and its place.

    `frame` counts the path's poses, `distance_m` is the horizontal distance of the
    captures from the path there.
    """

    captures: Int64[np.ndarray, " n"]
    heading_rad: Float64[np.ndarray, " n"]
    frame: Float64[np.ndarray, " n"]
    distance_m: Float64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.captures)

    def __getitem__(self, chosen) -> "Views":
        columns = (getattr(self, f.name)[chosen] for f in dataclasses.fields(self))
        return Views(*columns)


def ground_path(
    index: CaptureIndex,
    ecef_from_camera: Float64[np.ndarray, "T 4 4"],
    match: Match,
    way: str = WAYS[0],
    tail: int = 81,
) -> Views:
    """List the views along a whole path in order; poses in gaps have none.

    As driven, up to `tail` captures beyond the path's end follow.
    """
    if way == WAYS[0]:
        captures, frame = _by_distance(index, ecef_from_camera, match)
    else:
        captures, frame = _as_driven(index, match, tail)
    frames = np.arange(len(ecef_from_camera))
    heading = np.unwrap(headings(ecef_from_camera))
    wanted = np.interp(frame, frames, heading)
    if len(heading) > 1:
        beyond = np.maximum(frame - frames[-1], 0)
        wanted = wanted + beyond * (heading[-1] - heading[-2])
    path_m, _ = drop_to_ellipsoid(ecef_from_camera[:, :3, 3])
    place_m = np.stack([np.interp(frame, frames, x) for x in path_m.T], axis=-1)
    offset_m = index.tree.data[captures] - place_m
    return Views(captures, wanted, frame, np.linalg.norm(offset_m, axis=-1))


def ground_clips(
    index: CaptureIndex,
    ecef_from_camera: Float64[np.ndarray, "T 4 4"],
    firsts: Sequence[int],
    count: int,
    retrieval: Retrieval,
) -> tuple[Views, ...]:
    """Give up to `count` views for each clip, from its first pose on.

    The path is matched as a whole, and as far beyond its end as the last clip's
    condition reaches, on as it ended. Raises ValueError for a stretch of the path
    itself that nothing shows, if such are refused.
    """
    last = len(ecef_from_camera)
    whole = continue_path(ecef_from_camera, max(firsts) + count)
    match = match_path(index, whole, Costs(radius_m=retrieval.radius_m))
    if retrieval.gaps == "refuse":
        check_gaps(index, whole, match, last - 1)
    views = ground_path(index, whole, match, retrieval.way, count)
    clips = tuple(clip_views(views, first, count, retrieval.way) for first in firsts)
    for first, clip in zip(firsts, clips, strict=True):
        if retrieval.gaps == "refuse" and len(clip) == 0:
            place = int(match.frame_place[first])
            raise _gap_error(index, whole, match, place, place + 1)
    return clips


def clip_views(views: Views, first: int, count: int, way: str = WAYS[0]) -> Views:
    """Take up to `count` views from pose `first` on; by distance, of as many poses."""
    start = int(np.searchsorted(views.frame, first - 1e-6))
    stop = start + count
    if way == WAYS[0]:
        stop = int(np.searchsorted(views.frame, first + count - 1e-6))
    return views[start:stop]


def continue_path(
    ecef_from_camera: Float64[np.ndarray, "T 4 4"], count: int
) -> Float64[np.ndarray, "_ 4 4"]:
    """Go on behind a path's end as it ended, up to `count` poses."""
    poses = list(ecef_from_camera)
    step = np.eye(4)
    if len(poses) > 1:
        step = invert_rigid(poses[-2]) @ poses[-1]
    while len(poses) < count:
        poses.append(poses[-1] @ step)
    return np.stack(poses)


def check_gaps(
    index: CaptureIndex,
    ecef_from_camera: Float64[np.ndarray, "T 4 4"],
    match: Match,
    last_pose: int,
) -> None:
    """Raise ValueError naming the first stretch up to a pose that nothing shows."""
    end = int(match.frame_place[last_pose]) + 1
    for first, behind in match.gaps():
        behind = min(behind, end)
        if (behind - first) * match.step_m > SHORT_GAP_M:
            raise _gap_error(index, ecef_from_camera, match, first, behind)


class GapError(ValueError):
    """A stretch of a path that nothing shows; `pose` is its first."""

    def __init__(self, pose: int, message: str):
        super().__init__(message)
        self.pose = pose


def _gap_error(index, ecef_from_camera, match, first, behind) -> GapError:
    poses = np.searchsorted(match.frame_place, [first, behind - 1])
    return GapError(
        int(poses[0]),
        f"nothing was captured along {first * match.step_m:.0f} to "
        f"{behind * match.step_m:.0f} m of the path (poses {poses[0]} to {poses[1]}); "
        f"the nearest capture is {_nearest(index, ecef_from_camera, poses)}. Draw it "
        "along captured streets (python -m cityrag_jax.survey draws them), allow a "
        "larger radius, or let such stretches go without panoramas.",
    )


def _nearest(index, ecef_from_camera, poses) -> str:
    place_m = ecef_from_camera[int(poses[0]) : int(poses[1]) + 1, :3, 3]
    below_m, _ = drop_to_ellipsoid(place_m)
    told = f"{index.tree.query(below_m)[0].min():.1f} m away"
    latitude, longitude, _ = geodetic_from_ecef(place_m[0])
    if abs(longitude) <= 90:
        swapped = ecef_from_geodetic(float(longitude), float(latitude), 0.0)
        if index.tree.query(swapped)[0] < 10_000:
            told += " (with latitude and longitude swapped it lies in the city)"
    return told


def _by_distance(index, ecef_from_camera, match) -> tuple[np.ndarray, np.ndarray]:
    place = np.rint(match.frame_place).astype(np.int64)
    frame = np.flatnonzero(match.run[place] >= 0)
    place = place[frame]
    low, high = _around(match, place)
    captures = np.empty(len(frame), np.int64)
    for k in range(len(frame)):
        near = np.arange(low[k], high[k] + 1)
        offset_m = index.position_m[near] - ecef_from_camera[frame[k], :3, 3]
        captures[k] = near[np.argmin(np.sum(offset_m**2, axis=1))]
    return captures, frame.astype(np.float64)


def _around(match, place) -> tuple[np.ndarray, np.ndarray]:
    """Give the captures between the nodes on both sides of the one at a place."""
    nodes = match.nodes
    node = np.searchsorted(nodes.capture, match.capture[place])
    run = nodes.run[node]
    last = len(nodes.run) - 1
    before, behind = np.maximum(node - 1, 0), np.minimum(node + 1, last)
    before = np.where(nodes.run[before] == run, before, node)
    behind = np.where(nodes.run[behind] == run, behind, node)
    return nodes.capture[before], nodes.capture[behind]


def _as_driven(index, match, tail) -> tuple[np.ndarray, np.ndarray]:
    """Follow each matched pass from where it begins to show the path to where it ends.

    The last goes on by `tail` captures beyond the path, if its drive does.
    """
    nodes, captures, places = match.nodes, [np.zeros(0, np.int64)], [np.zeros(0)]
    for a, b in _passes(match):
        first, last = int(match.capture[a]), int(match.capture[b - 1])
        sign = -1 if match.backward[a] else 1
        if sign * (last - first) < 0:
            last = first
        if b == len(match.run):
            stop = drive_stop(index.drive_edges, last)
            start = int(index.drive_edges[index.drive_edges < stop][-1])
            last = min(last + tail, stop - 1) if sign > 0 else max(last - tail, start)
        capture = np.arange(first, last + sign, sign)
        known = slice(*np.searchsorted(nodes.run, [match.run[a], match.run[a] + 1]))
        along_m = np.interp(capture, nodes.capture[known], nodes.along_m[known])
        edge = nodes.capture[known][-1 if sign > 0 else 0]
        step_m = np.diff(index.position_m[capture], axis=0, prepend=np.nan)
        beyond = sign * (capture - edge) > 0
        far_m = np.cumsum(np.where(beyond, np.linalg.norm(step_m, axis=1), 0))
        moved_m = sign * (along_m - match.along_m[a]) + far_m
        captures.append(capture)
        places.append(a + np.maximum(moved_m, 0) / match.step_m)
    place = np.maximum.accumulate(np.concatenate(places))
    return np.concatenate(captures), _frames_at(match.frame_place, place)


def _passes(match) -> list[tuple[int, int]]:
    """Part the places where another pass, another direction or a leap back begins."""
    run, sign = match.run, np.where(match.backward, -1, 1)
    with np.errstate(invalid="ignore"):
        back = np.diff(match.along_m) * sign[1:] < -10
    new = (np.diff(run) != 0) | (np.diff(sign) != 0) | back
    edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(run)]
    pairs = zip(edges[:-1], edges[1:], strict=True)
    return [(a, b) for a, b in pairs if run[a] >= 0]


def _frames_at(frame_place, place) -> np.ndarray:
    """Count the poses at places; beyond the end at the mean rate of the path."""
    last = len(frame_place) - 1
    frame = np.interp(place, frame_place, np.arange(last + 1))
    rate = last / frame_place[-1] if frame_place[-1] > 0 else 0.0
    return frame + np.maximum(place - frame_place[-1], 0) * rate
