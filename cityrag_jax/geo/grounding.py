"""From a match to the views that ground a clip: captures, and where each faces.

Two ways to choose them (section 3.2 and appendix B). *By distance*: one capture for
each pose of the path, the nearest on the pass that shows it, so that the condition
moves as the video shall. *As driven*: the captures of the matched passes one after the
other, at the drives' own speed and with their stops, as in training. Either way a
capture faces as the path does where it stands, in the whole path, not in one clip's.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int64

from cityrag_jax.geo.matching import Match
from cityrag_jax.geo.retrieval import CaptureIndex, drive_stop
from cityrag_jax.geo.trajectory import headings

WAYS = ("by-distance", "as-driven")


@dataclasses.dataclass(frozen=True)
class Views:
    """Captures of other drives, the heading that each faces, and its place.

    `frame` counts the path's poses, `distance_m` is the horizontal distance of the
    captures from the path there.
    """

    capture: Int64[np.ndarray, " n"]
    heading_rad: Float64[np.ndarray, " n"]
    frame: Float64[np.ndarray, " n"]
    distance_m: Float64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.capture)

    def __getitem__(self, chosen) -> "Views":
        columns = (getattr(self, f.name)[chosen] for f in dataclasses.fields(self))
        return Views(*columns)


def ground_path(
    index: CaptureIndex,
    ecef_from_camera: Float64[np.ndarray, "T 4 4"],
    match: Match,
    way: str = "by-distance",
    tail: int = 81,
) -> Views:
    """List the views along a whole path in order; poses in gaps have none.

    As driven, up to `tail` captures beyond the path's end follow.
    """
    if way == "by-distance":
        capture, frame = _by_distance(index, ecef_from_camera, match)
    elif way == "as-driven":
        capture, frame = _as_driven(index, match, tail)
    else:
        raise ValueError(f"Retrieval is {way!r}; choose one of {', '.join(WAYS)}.")
    frames = np.arange(len(ecef_from_camera))
    heading = np.unwrap(headings(ecef_from_camera))
    wanted = np.interp(frame, frames, heading)
    if len(heading) > 1:
        beyond = np.maximum(frame - frames[-1], 0)
        wanted = wanted + beyond * (heading[-1] - heading[-2])
    place_m = np.stack(
        [np.interp(frame, frames, ecef_from_camera[:, i, 3]) for i in range(3)], -1
    )
    up = place_m / np.linalg.norm(place_m, axis=-1, keepdims=True)
    offset_m = index.position_m[capture] - place_m
    above_m = np.sum(offset_m * up, axis=-1)
    aside2 = np.maximum(np.sum(offset_m**2, axis=-1) - above_m**2, 0)
    return Views(capture, wanted, frame, np.sqrt(aside2))


def clip_views(views: Views, first: int, count: int) -> Views:
    """Take up to `count` views from pose `first` on."""
    start = int(np.searchsorted(views.frame, first - 1e-6))
    return views[start : start + count]


def check_gaps(match: Match, most_m: float) -> None:
    """Raise ValueError naming the stretches longer than `most_m` that nothing shows."""
    gaps = [(a, b) for a, b in match.gaps() if (b - a) * match.step_m > most_m]
    if gaps:
        told = ", ".join(
            f"{a * match.step_m:.0f} to {b * match.step_m:.0f} m" for a, b in gaps[:5]
        )
        raise ValueError(
            f"No capture lies near the path from {told}; draw it along captured "
            "streets, raise the radius, or let such stretches go without panoramas."
        )


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
