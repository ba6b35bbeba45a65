"""How often, and at how many times, streets were driven.

A street is what drives have in common: where several went, their lengths count once.
Places are metres in any frame whose distances are those on the map, one row a capture,
drives consecutive and in order of time.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64
from scipy.spatial import cKDTree

WITHIN_M = 10.0  # satellites' errors, and two lanes
STEP_M = 30.0  # a longer one is a gap
MOST = 20_000  # steps that stand for all where there are more
AGAIN = 3  # captures left out of a pass by noise before it is another one


@dataclasses.dataclass(frozen=True)
class Revisits:
    """Steps along drives, and what came by there.

    `row` is the capture that a step begins at. `street_m` is its share of the street's
    length: all steps of all passes add up to it. `times` counts passes that were apart
    by more than the gap. Of very many steps one stands for `every` that follow.
    """

    row: Int64[np.ndarray, " S"]
    street_m: Float64[np.ndarray, " S"]
    times: Int64[np.ndarray, " S"]
    every: int = 1

    def metres(self, seen: Bool[np.ndarray, " S"] | None = None) -> float:
        """Give the length of all streets, or of some steps'."""
        return float(self.street_m[... if seen is None else seen].sum())


def find_revisits(
    place_m: Float64[np.ndarray, "N D"],
    drive: Int[np.ndarray, " N"],
    time_s: Float64[np.ndarray, " N"],
    *,
    gap_s: float,
    within_m: float = WITHIN_M,
) -> Revisits:
    """Count the passes near each step between captures of a drive."""
    step_m = np.linalg.norm(np.diff(place_m, axis=0), axis=1)
    rows = np.flatnonzero((drive[1:] == drive[:-1]) & (step_m <= STEP_M) & (step_m > 0))
    if len(rows) == 0:
        return Revisits(rows, np.zeros(0), rows)
    passing = np.zeros(len(place_m), bool)  # a picture alone is no pass
    passing[rows] = passing[rows + 1] = True
    every = -(-len(rows) // MOST)
    length_m = step_m[rows]
    rows = rows[::every]
    lengths_m = np.add.reduceat(length_m, np.arange(0, len(length_m), every))
    middle_m = (place_m[rows] + place_m[rows + 1]) / 2
    near = cKDTree(place_m).query_ball_point(middle_m, within_m, return_sorted=True)
    passes, times = np.ones(len(rows), int), np.ones(len(rows), int)
    for k, found in enumerate(near):
        found = np.array(found, int)
        found = found[passing[found]]
        if len(found) == 0:  # in the middle of a step longer than twice the distance
            continue
        apart = (np.diff(found) > AGAIN) | (np.diff(drive[found]) != 0)
        first = np.concatenate([[0], np.flatnonzero(apart) + 1])
        passes[k] = len(first)
        times[k] = 1 + np.sum(np.diff(np.sort(time_s[found[first]])) >= gap_s)
    return Revisits(rows, lengths_m / passes, times, every)


def join_steps(
    found: Revisits, seen: Bool[np.ndarray, " S"]
) -> list[Int64[np.ndarray, " _"]]:
    """Give the captures of lines along some of the steps."""
    rows = found.row[seen]
    if len(rows) == 0:
        return []
    parts = np.split(rows, np.flatnonzero(np.diff(rows) > found.every) + 1)
    return [np.concatenate([part, part[-1:] + 1]) for part in parts]
