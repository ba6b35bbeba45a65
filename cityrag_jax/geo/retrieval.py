"""Find the captures of a city by place (section 3.3).

One k-d tree over all captures, built once (5.5 million in a few seconds), on the
ellipsoid below them: who looks for a place on a map need not know its height. Captures
of a drive are consecutive, so the next ones of a drive are found by adding one.
Positions are ECEF float64 metres, times are seconds, headings radians clockwise from
north.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int32, Int64
from scipy.spatial import cKDTree

from cityrag_jax.geo.ecef import drop_to_ellipsoid


@dataclasses.dataclass(frozen=True)
class CaptureIndex:
    """Captures of one city, findable by place. Build it with `index_captures`.

    The tree's points lie on the ellipsoid, `height_m` below the positions.
    """

    tree: cKDTree
    position_m: Float64[np.ndarray, "N 3"]
    height_m: Float64[np.ndarray, " N"]
    drive: Int32[np.ndarray, " N"]
    time_s: Float64[np.ndarray, " N"]
    drive_edges: Int64[np.ndarray, " D"]


def index_captures(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    drive: Int32[np.ndarray, " N"],
    time_s: Float64[np.ndarray, " N"],
) -> CaptureIndex:
    """Index captures by place; those of a drive must be consecutive and in order."""
    position_m = np.ascontiguousarray(ecef_from_camera[:, :3, 3])
    below_m, height_m = drop_to_ellipsoid(position_m)
    edges = drive_edges(drive)
    tree = build_tree(below_m)
    return CaptureIndex(tree, position_m, height_m, drive, time_s, edges)


def build_tree(position_m: Float64[np.ndarray, "N 3"]) -> cKDTree:
    """Build a k-d tree the fast way: 3.5 s instead of 8.6 s for 5.5 million."""
    return cKDTree(position_m, balanced_tree=False, compact_nodes=False)


def drive_edges(drive: Int32[np.ndarray, " N"]) -> Int64[np.ndarray, " D"]:
    """Give the captures at which a drive begins, and the number of captures last."""
    begins = np.flatnonzero(np.diff(drive)) + 1
    return np.concatenate([[0], begins, [len(drive)]]).astype(np.int64)


def drive_stop(edges: Int64[np.ndarray, " D"], capture: int) -> int:
    """Give the capture after the last one of a capture's drive."""
    return int(edges[np.searchsorted(edges, capture, "right")])
