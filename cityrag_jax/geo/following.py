"""One drive along another: which captures of it lie beside a window of captures.

Places are looked at on the ellipsoid, as on a map: heights err more than they do.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int32, Int64
from scipy.spatial.distance import cdist

from cityrag_jax.geo.ecef import drop_to_ellipsoid
from cityrag_jax.geo.retrieval import build_tree, drive_edges

AROUND = 5  # captures ahead and behind that tell the course: noise must not turn it


@dataclasses.dataclass(frozen=True)
class Track:
    """Places and heights of captures, and how they were driven through.

    Positions lie on the ellipsoid, from the city's middle. `along_m` counts along the
    course, so that noise of the places does not lengthen the way. `leaps` counts the
    steps longer than is allowed up to each capture.
    """

    position_m: Float64[np.ndarray, "N 3"]
    height_m: Float64[np.ndarray, " N"]
    leaps: Int64[np.ndarray, " N"]
    along_m: Float64[np.ndarray, " N"]
    direction: Float64[np.ndarray, "N 3"]
    edges: Int64[np.ndarray, " D"]


def make_track(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    drive: Int32[np.ndarray, " N"],
    max_step_m: float,
) -> Track:
    """Lay captures, those of a drive consecutive and in order, on the ellipsoid."""
    below_m, height_m = drop_to_ellipsoid(ecef_from_camera[:, :3, 3])
    position_m = below_m - below_m.mean(0)
    edges = drive_edges(drive)
    steps = np.diff(position_m, axis=0, prepend=position_m[:1])
    steps[edges[:-1]] = 0
    lengths = np.diff(edges)
    low, high = np.repeat(edges[:-1], lengths), np.repeat(edges[1:] - 1, lengths)
    index = np.arange(len(position_m))
    ahead = position_m[np.minimum(index + AROUND, high)]
    moved = ahead - position_m[np.maximum(index - AROUND, low)]
    length_m = np.linalg.norm(moved, axis=1, keepdims=True)
    direction = np.where(length_m > 0.1, moved / np.maximum(length_m, 0.1), 0)
    leaps = np.cumsum(np.linalg.norm(steps, axis=1) > max_step_m)
    along_m = np.cumsum(np.einsum("nk,nk->n", steps, direction))
    return Track(position_m, height_m, leaps, along_m, direction, edges)


def follow_drive(
    track: Track, first: Int64[np.ndarray, " W"], anchor: int, num_frames: int
) -> tuple[Int64[np.ndarray, "W {num_frames}"], Float64[np.ndarray, " W"]]:
    """Match each capture of windows to the nearest of an anchor's drive.

    Gives the matches and their mean distances.
    """
    low, high = _drive_of(track, anchor)
    windows = first[:, None] + np.arange(num_frames)[None]
    asked, where = np.unique(windows, return_inverse=True)
    tree = build_tree(track.position_m[low:high])
    distance_m, nearest = tree.query(track.position_m[asked])
    where = where.reshape(windows.shape)
    return low + nearest[where], distance_m[where].mean(1)


def follow_pass(
    track: Track, window: Int64[np.ndarray, " N"], anchor: int, reach_m: float
) -> tuple[Int64[np.ndarray, " N"], float]:
    """Match a window to the captures that an anchor's drive took as it came by there.

    No farther along than the window could be followed, and of those that go the other
    way only where nothing else is within two reaches.
    """
    low, high = _drive_of(track, anchor)
    along_m = np.maximum.accumulate(track.along_m[low:high])
    ours_m = track.along_m[window[-1]] - track.along_m[window[0]]
    here_m = along_m[anchor - low]
    ends_m = [here_m - 3 * reach_m, here_m + 2 * ours_m + 5 * reach_m]
    start, stop = low + np.searchsorted(along_m, ends_m)
    taken = np.arange(start, max(stop, anchor + 1))

    def states(places):
        turned = reach_m * track.direction[places]
        return np.concatenate([track.position_m[places], turned], axis=1)

    match = taken[cdist(states(window), states(taken)).argmin(1)]
    steps_m = track.position_m[window] - track.position_m[match]
    return match, float(np.linalg.norm(steps_m, axis=1).mean())


def _drive_of(track: Track, capture: int) -> tuple[int, int]:
    place = int(np.searchsorted(track.edges, capture, "right"))
    return int(track.edges[place - 1]), int(track.edges[place])
