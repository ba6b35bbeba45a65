"""Neighbourhoods of a real city: parts of its streets that can be held out (3.1)."""

import numpy as np
from jaxtyping import Float64, Int32
from scipy.spatial import cKDTree

CELL_M = 25.0  # a street as a row of cells: long drives weigh no more than short ones
CELLS = 40  # of a neighbourhood where their number is not given: a kilometre of street
ROUNDS = 30


def cluster_places(
    place_m: Float64[np.ndarray, "N 3"], count: int | None = None, seed: int = 0
) -> Int32[np.ndarray, " N"]:
    """Give places numbers of neighbourhoods of about equal streets, by k-means.

    Means are taken over occupied cells of `CELL_M`, not over captures; the first ones
    are drawn far apart (k-means++). The same numbers come for a seed and the same
    places. `count` None gives a neighbourhood to each kilometre of street.
    """
    cells, cell = np.unique(
        np.round(place_m / CELL_M).astype(np.int64), axis=0, return_inverse=True
    )
    points = cells * CELL_M
    if count is None:
        count = max(1, round(len(cells) / CELLS))
    if not 1 <= count <= len(cells):
        raise ValueError(
            f"{count} neighbourhoods of {len(cells)} places {CELL_M:g} m apart cannot "
            f"be; give 1 to {len(cells)}."
        )
    centres = _spread(points, count, np.random.default_rng(seed))
    for _ in range(ROUNDS):
        _, nearest = cKDTree(centres).query(points)
        size = np.bincount(nearest, minlength=count)
        sums = [np.bincount(nearest, points[:, k], count) for k in range(3)]
        moved = np.stack(sums, 1) / np.maximum(size, 1)[:, None]
        moved[size == 0] = centres[size == 0]
        if np.array_equal(moved, centres):
            break
        centres = moved
    _, nearest = cKDTree(centres).query(points)
    # Without empty ones, so that the numbers run from 0.
    _, numbers = np.unique(nearest, return_inverse=True)
    return numbers[cell.reshape(-1)].astype(np.int32)


def _spread(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw first means, each with the squared distance from those before it."""
    chosen = [int(rng.integers(len(points)))]
    distance2 = np.full(len(points), np.inf)
    for _ in range(count - 1):
        step2 = np.sum((points - points[chosen[-1]]) ** 2, axis=1)
        distance2 = np.minimum(distance2, step2)
        chosen.append(int(rng.choice(len(points), p=distance2 / distance2.sum())))
    return points[chosen].astype(float)
