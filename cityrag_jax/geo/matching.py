"""Match a path to the captures of a city: which capture shows which place (3.3).

At every metre of a path the states are the passes of drives that lie within reach, each
by its nearest capture, and nothing. Viterbi finds the cheapest sequence. Costs are
square metres: a metre of path costs the squared distance over 5, more where the drive
goes across, backward (a panorama shows both ways), or was long ago or in another
season; leaving one pass for another costs as much as 20 metres of path that are 5
metres off. The numbers are *assumed*: the paper shows stitched drives (figure 5), not
how they are chosen.

The search is horizontal. Heights only tell levels apart: a street's height is that of
the drives *along* the path, and what crosses more than 4 m above or below it is another
level. Distances are metres, headings radians clockwise from north.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.spatial import cKDTree

from cityrag_jax.geo.ecef import (
    drop_to_ellipsoid,
    ecef_from_geodetic,
    geodetic_from_ecef,
)
from cityrag_jax.geo.passes import (
    STEP_M,
    Line,
    Nodes,
    find_nodes,
    interpolate,
    lay_out,
    lengths,
)
from cityrag_jax.geo.retrieval import CaptureIndex
from cityrag_jax.geo.trajectory import headings

YEAR_S = 365.25 * 86400
LEVEL_M = 4.0  # streets less apart in height are one level
ALONG_COS = np.cos(np.deg2rad(50.0))  # less turned from the path is along it


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a match costs, in square metres; a metre of path where no unit is said.

    `distance` divides the squared distance, `switch` is for changing passes once,
    `across` for a drive at right angles, `climb` for each metre of height beyond
    LEVEL_M when passes change, `year` and `season` (opposite ones) between a capture
    and `when_s`, or the city's newest capture.
    """

    radius_m: float = 15.0
    distance: float = 5.0
    switch: float = 100.0
    drift: float = 2.0
    across: float = 10.0
    backward: float = 2.0
    climb: float = 20.0
    year: float = 0.1
    season: float = 0.5
    when_s: float | None = None

    @property
    def nothing(self) -> float:
        """More than any capture within reach."""
        return self.radius_m**2 / self.distance + self.across + self.backward + 10.0


class States(NamedTuple):
    """Pairs of a place and a node that may show it, in order of places."""

    place: Int64[np.ndarray, " S"]
    node: Int64[np.ndarray, " S"]
    along_m: Float64[np.ndarray, " S"]  # where the drive passes the place
    sign: Float64[np.ndarray, " S"]  # -1 where the drive goes backward
    cosine: Float64[np.ndarray, " S"]
    distance_m: Float64[np.ndarray, " S"]
    cost: Float64[np.ndarray, " S"]


@dataclasses.dataclass(frozen=True)
class Match:
    """Which pass shows each place of a path, a metre apart; -1 where none does.

    `frame_place` counts the places at each of the path's poses. `distance_m` is that
    of the drive's line, horizontal, NaN where nothing is; `height_m` that of cameras,
    without the steps between drives whose heights disagree.
    """

    nodes: Nodes
    run: Int64[np.ndarray, " P"]
    capture: Int64[np.ndarray, " P"]
    along_m: Float64[np.ndarray, " P"]
    backward: Bool[np.ndarray, " P"]
    distance_m: Float64[np.ndarray, " P"]
    height_m: Float64[np.ndarray, " P"]
    frame_place: Float64[np.ndarray, " T"]
    step_m: float

    @property
    def jumps(self) -> int:
        """How often one pass follows another, gaps between them or not."""
        runs = self.run[self.run >= 0]
        return int(np.sum(np.diff(runs) != 0))

    def gaps(self) -> list[tuple[int, int]]:
        """List stretches of places that nothing shows: first, and the one behind."""
        edges = np.flatnonzero(np.diff(self.run < 0, prepend=False, append=False))
        return [tuple(pair) for pair in edges.reshape(-1, 2).tolist()]


def match_path(
    index: CaptureIndex,
    ecef_from_camera: Float64[np.ndarray, "T 4 4"],
    costs: Costs | None = None,
    allowed: Bool[np.ndarray, " N"] | None = None,
) -> Match:
    """Find the captures along a path of poses; `allowed` leaves some out."""
    below_m, _ = drop_to_ellipsoid(ecef_from_camera[:, :3, 3])
    line = lay_out(below_m, float(headings(ecef_from_camera[:1])[0]))
    return _match(index, line, costs or Costs(), allowed)


def fill_heights(
    index: CaptureIndex, path: Float64[np.ndarray, "M 3"], costs: Costs | None = None
) -> Float64[np.ndarray, "P 3"]:
    """Lay a drawn path on the streets: a place each metre, at the cameras' height.

    Rows are latitude, longitude (degrees) and height, NaN where unknown. Heights are
    those of the drives along the path, linear where there are none. A path's own choose
    the level, and stay if they are all known and within 10 m of it, as zeros and
    heights above the sea are not.
    """
    latitude, longitude, height_m = path.T
    corner_m = ecef_from_geodetic(latitude, longitude, np.zeros_like(latitude))
    along_m = lengths(corner_m)
    # All corners stay, so that a path comes back as it was drawn.
    wanted_m = np.unique(np.concatenate([along_m, np.arange(0, along_m[-1], STEP_M)]))
    below_m, _ = drop_to_ellipsoid(interpolate(wanted_m, along_m, corner_m))
    line = lay_out(below_m, 0.0)
    places = np.arange(len(line.height_m))
    known = np.isfinite(height_m)
    own_m = np.full(len(wanted_m), np.nan)
    if known.any():
        own_m = np.interp(wanted_m, along_m[known], height_m[known])
        line = line._replace(height_m=np.interp(places, line.frame_place, own_m))
    found = _match(index, line, costs or Costs(), None)
    filled_m = np.interp(line.frame_place, places, found.height_m)
    if known.all() and np.median(np.abs(own_m - filled_m)) < 10:
        filled_m = own_m
    latitude, longitude, _ = geodetic_from_ecef(below_m)
    return np.stack([latitude, longitude, filled_m], axis=-1)


def _match(index, line, costs, allowed) -> Match:
    nodes = find_nodes(index, line, costs.radius_m, allowed)
    states = _find_states(index, nodes, line, costs)
    # First the drives along the path alone: they know how high the street is.
    along = np.abs(states.cosine) >= ALONG_COS
    states_along = _choose(states, along)
    first = _viterbi(nodes, states_along, line, costs)
    street_m, height_m = _street_heights(index, nodes, states_along, first, line)
    with np.errstate(invalid="ignore"):
        off_m = np.abs(nodes.height_m[states.node] - street_m[states.place])
        states = _choose(states, along | ~(off_m > LEVEL_M))
    best = _viterbi(nodes, states, line, costs)
    shown = best >= 0
    found = _choose(states, best[shown])

    def spread(values, otherwise):
        whole = np.full(len(best), otherwise, values.dtype)
        whole[shown] = values
        return whole

    return Match(
        nodes,
        run=spread(nodes.run[found.node], -1),
        capture=spread(nodes.capture[found.node], -1),
        along_m=spread(found.along_m, np.nan),
        backward=spread(found.sign < 0, False),
        distance_m=spread(found.distance_m, np.nan),
        height_m=height_m,
        frame_place=line.frame_place,
        step_m=line.step_m,
    )


def _find_states(index, nodes, line, costs) -> States:
    if len(nodes.run) == 0:
        return _no_states()
    tree = cKDTree(nodes.place_m)
    found = tree.query_ball_point(line.place_m, costs.radius_m, return_sorted=True)
    place = np.repeat(np.arange(len(found)), [len(f) for f in found])
    node = np.concatenate([np.asarray(f, np.int64) for f in found])
    offset_m = line.place_m[place] - nodes.place_m[node]
    far_m = np.linalg.norm(offset_m, axis=1)
    # Of each pass the captures that it comes nearest with.
    if len(node) == 0:
        return _no_states()
    beside = (np.diff(place) == 0) & (np.diff(node) == 1)
    beside &= np.diff(nodes.run[node]) == 0
    nearer = np.append(far_m[:-1] <= far_m[1:], True) | ~np.append(beside, False)
    nearer &= np.append(True, far_m[1:] < far_m[:-1]) | ~np.append(False, beside)
    place, node, offset_m = place[nearer], node[nearer], offset_m[nearer]
    direction, half_m = nodes.direction[node], nodes.half_m[node]
    ahead_m = np.sum(offset_m * direction, axis=1)
    beyond_m = np.maximum(np.abs(ahead_m) - half_m, 0)
    aside2 = np.maximum(np.sum(offset_m**2, axis=1) - ahead_m**2, 0)
    cosine = np.sum(direction * line.direction[place], axis=1)
    stands = ~direction.any(axis=1)
    cosine = np.where(stands, 1.0, cosine)
    cost = (aside2 + beyond_m**2) / costs.distance
    cost += costs.across * (1 - cosine**2) + costs.backward * (cosine < 0)
    cost += _age_cost(index, nodes.capture[node], costs)
    off_m = np.abs(nodes.height_m[node] - line.height_m[place])
    cost += np.where(np.isfinite(off_m), np.minimum(off_m, 10.0) ** 2 / 10, 0)
    return States(
        place=place,
        node=node,
        along_m=nodes.along_m[node] + np.clip(ahead_m, -half_m, half_m),
        sign=np.where(cosine < 0, -1.0, 1.0),
        cosine=cosine,
        distance_m=np.sqrt(aside2 + beyond_m**2),
        cost=cost * line.step_m,
    )


def _no_states() -> States:
    none, nowhere = np.zeros(0, np.int64), np.zeros(0)
    return States(none, none, *[nowhere] * 5)


def _age_cost(index, capture, costs) -> np.ndarray:
    when_s = costs.when_s if costs.when_s is not None else index.time_s.max()
    years = (index.time_s[capture] - when_s) / YEAR_S
    season = (1 - np.cos(2 * np.pi * years)) / 2
    return costs.year * np.abs(years) + costs.season * season


def _choose(states: States, kept: np.ndarray) -> States:
    return States(*(column[kept] for column in states))


def _viterbi(nodes: Nodes, states: States, line: Line, costs: Costs) -> np.ndarray:
    """Give the state of each place in the cheapest sequence, -1 for nothing."""
    count = len(line.place_m)
    edges = np.searchsorted(states.place, np.arange(count + 1))
    run, height_m = nodes.run[states.node], nodes.height_m[states.node]
    enter, empty = costs.switch / 2, costs.nothing * line.step_m
    back, back_nothing = np.full(len(run), -1), np.full(count, -1)
    before, total, nothing = slice(0, 0), np.zeros(0), -enter
    for k in range(count):
        here = slice(edges[k], edges[k + 1])
        best = np.full(here.stop - here.start, nothing + enter)
        if len(total) and len(best):
            moved_m = states.along_m[here] - states.along_m[before][:, None]
            drift_m = np.abs(moved_m - states.sign[here] * line.step_m)
            climb_m = np.abs(height_m[here] - height_m[before][:, None]) - LEVEL_M
            leap = costs.switch + costs.climb * np.clip(climb_m, 0, 10)
            same = run[before][:, None] == run[here]
            step = np.where(same, np.minimum(costs.drift * drift_m, leap), leap)
            reached = total[:, None] + step
            origin = np.argmin(reached, axis=0)
            through = reached[origin, np.arange(len(best))]
            taken = through <= best
            best = np.where(taken, through, best)
            back[here] = np.where(taken, origin + before.start, -1)
        if len(total) and total.min() + enter < nothing:
            nothing = total.min() + enter
            back_nothing[k] = before.start + int(np.argmin(total))
        total, nothing, before = best + states.cost[here], nothing + empty, here
    state = -1
    if len(total) and total.min() <= nothing:
        state = before.start + int(np.argmin(total))
    found = np.full(count, -1)
    for k in range(count - 1, -1, -1):
        found[k] = state
        state = back[state] if state >= 0 else back_nothing[k]
    return found


def _street_heights(index, nodes, states, best, line):
    """Give heights of the drives along a path, raw, and of a camera that follows it.

    Where passes change, the raw ones step by the error of a drive's heights; the other
    goes on smoothly. Both are linear where nothing is.
    """
    count = len(best)
    shown = np.flatnonzero(best >= 0)
    if len(shown) == 0:
        _, nearest = index.tree.query(line.below_m)
        return np.full(count, np.nan), index.height_m[nearest]
    state = best[shown]
    run = nodes.run[states.node[state]]
    first = nodes.along_m[np.searchsorted(nodes.run, run)]
    last = nodes.along_m[np.searchsorted(nodes.run, run, "right") - 1]
    along_m = np.clip(states.along_m[state], first, last)
    raw_m = np.interp(along_m, nodes.along_m, nodes.height_m)
    steps_m = np.where(np.diff(run) != 0, -np.diff(raw_m), 0)
    smooth_m = raw_m + np.concatenate([[0], np.cumsum(steps_m)])
    parts = np.flatnonzero(np.diff(shown) > 1) + 1
    for part in np.split(np.arange(len(shown)), parts):
        # After a gap nothing tells a step from a slope.
        smooth_m[part] += raw_m[part[0]] - smooth_m[part[0]]
    places = np.arange(count)
    return np.interp(places, shown, raw_m), np.interp(places, shown, smooth_m)
