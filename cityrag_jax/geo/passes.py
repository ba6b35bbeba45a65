"""The passes of drives near a path: what map matching chooses from.

A path is laid on the plane that touches the Earth at its start, and walked in steps of
about a metre. A pass is a stretch in which a drive stays near the path: one that comes
back later makes two. Its nodes are the captures at which the drive moves, so that a red
light is one place.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from cityrag_jax.geo.ecef import enu_axes, geodetic_from_ecef
from cityrag_jax.geo.retrieval import CaptureIndex

STEP_M = 1.0  # between places
NODE_M = 1.0  # a drive that moves less stands
DIRECTION_M = 2.5  # either way, for directions of travel
GAP_M = 30.0  # between captures of one pass, at most
HALF_SPACING_M = 5.0  # a capture stands for so much of its drive either way, at most


class Nodes(NamedTuple):
    """Captures near a path, thinned to where their drives move, pass by pass."""

    capture: Int64[np.ndarray, " n"]
    run: Int64[np.ndarray, " n"]  # number of the pass
    place_m: Float64[np.ndarray, "n 2"]
    height_m: Float64[np.ndarray, " n"]
    along_m: Float64[np.ndarray, " n"]  # grows by GAP_M and more from pass to pass
    direction: Float64[np.ndarray, "n 2"]  # 0 where it stands
    half_m: Float64[np.ndarray, " n"]  # of the spacing


class Line(NamedTuple):
    """A path on the plane that touches the Earth at its start."""

    place_m: Float64[np.ndarray, "P 2"]
    direction: Float64[np.ndarray, "P 2"]
    below_m: Float64[np.ndarray, "P 3"]  # ECEF, on the ellipsoid
    height_m: Float64[np.ndarray, " P"]  # as given; NaN where unknown
    east_north: Float64[np.ndarray, "3 2"]
    frame_place: Float64[np.ndarray, " T"]
    step_m: float


def lay_out(below_m: Float64[np.ndarray, "T 3"], heading_rad: float) -> Line:
    """Walk a path in steps of about a metre; one that stands is a single place."""
    latitude, longitude, _ = geodetic_from_ecef(below_m[0])
    axes = enu_axes(latitude, longitude)[:, :2]
    vertex_m = (below_m - below_m[0]) @ axes
    along_m = lengths(vertex_m)
    count = round(along_m[-1] / STEP_M) + 1
    wanted_m = np.linspace(0, along_m[-1], count)
    step_m = along_m[-1] / (count - 1) if count > 1 else STEP_M
    direction = np.array([[np.sin(heading_rad), np.cos(heading_rad)]])
    if count > 1:
        ahead_m = interpolate(wanted_m + DIRECTION_M, along_m, vertex_m)
        behind_m = interpolate(wanted_m - DIRECTION_M, along_m, vertex_m)
        direction = _unit(ahead_m - behind_m)
    return Line(
        place_m=interpolate(wanted_m, along_m, vertex_m),
        direction=direction,
        below_m=interpolate(wanted_m, along_m, below_m),
        height_m=np.full(count, np.nan),
        east_north=axes,
        frame_place=along_m / step_m if count > 1 else np.zeros(len(along_m)),
        step_m=float(step_m),
    )


def find_nodes(
    index: CaptureIndex,
    line: Line,
    radius_m: float,
    allowed: Bool[np.ndarray, " N"] | None = None,
) -> Nodes:
    """Find the passes within a radius of a path, and where their drives move."""
    every = max(1, int(5 / line.step_m))
    reach_m = radius_m + every * line.step_m / 2 + 1
    some_m = np.concatenate([line.below_m[::every], line.below_m[-1:]])
    found = index.tree.query_ball_point(some_m, reach_m)
    capture = np.unique(np.concatenate([np.asarray(f, np.int64) for f in found]))
    if allowed is not None:
        capture = capture[allowed[capture]]
    place_m = (index.tree.data[capture] - line.below_m[0]) @ line.east_north
    moved_m = np.linalg.norm(np.diff(place_m, axis=0), axis=1)
    new = (np.diff(capture) > 1) | (np.diff(index.drive[capture]) != 0)
    run = np.concatenate([[0], np.cumsum(new | (moved_m > GAP_M))])[: len(capture)]
    kept = _where_it_moves(place_m, run)
    capture, run, place_m = capture[kept], run[kept], place_m[kept]
    if len(capture) == 0:
        none = np.zeros(0)
        return Nodes(capture, run, place_m, none, none, place_m, none)
    step_m = np.linalg.norm(np.diff(place_m, axis=0, prepend=place_m[:1]), axis=1)
    begins = np.diff(run, prepend=-1) != 0
    along_m = np.cumsum(np.where(begins, 2 * GAP_M, step_m))
    inner = np.where(begins, 0, step_m)
    half_m = np.maximum(inner, np.append(inner[1:], 0)) / 2
    return Nodes(
        capture=capture,
        run=run,
        place_m=place_m,
        height_m=index.height_m[capture],
        along_m=along_m,
        direction=_directions(place_m, along_m, run),
        half_m=np.clip(half_m, NODE_M / 2, HALF_SPACING_M),
    )


def _where_it_moves(place_m: np.ndarray, run: np.ndarray) -> list[int]:
    """Keep the captures of a run that lie NODE_M from the last that was kept."""
    kept, last = [], (np.inf, np.inf, -1)
    rows = zip(
        place_m[:, 0].tolist(), place_m[:, 1].tolist(), run.tolist(), strict=True
    )
    for k, (east, north, number) in enumerate(rows):
        far2 = (east - last[0]) ** 2 + (north - last[1]) ** 2
        if number != last[2] or far2 >= NODE_M**2:
            kept.append(k)
            last = (east, north, number)
    return kept


def _directions(place_m, along_m, run) -> np.ndarray:
    """Give directions of travel over DIRECTION_M either way, within a run."""
    here = np.arange(len(run))
    low = np.minimum(np.searchsorted(along_m, along_m - DIRECTION_M), here - 1)
    high = np.searchsorted(along_m, along_m + DIRECTION_M, "right") - 1
    high = np.maximum(high, here + 1)
    low = np.maximum(low, np.searchsorted(run, run))
    high = np.minimum(high, np.searchsorted(run, run, "right") - 1)
    return _unit(place_m[high] - place_m[low])


def lengths(points_m: Float64[np.ndarray, "T D"]) -> Float64[np.ndarray, " T"]:
    """Give the length of a polyline up to each of its points."""
    steps_m = np.linalg.norm(np.diff(points_m, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps_m)])


def interpolate(
    wanted: Float64[np.ndarray, " P"],
    known: Float64[np.ndarray, " T"],
    points: Float64[np.ndarray, "T D"],
) -> Float64[np.ndarray, "P D"]:
    """Give the points at places of a line whose `points` stand at `known` ones."""
    columns = [np.interp(wanted, known, column) for column in points.T]
    return np.stack(columns, axis=-1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale to length 1; what is shorter than 0.1 m has no direction."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 0.1, vectors / np.maximum(length, 0.1), 0.0)
