"""What holds of any drives, drawn by hypothesis: coverage, pairs, and drawn lines.

Drives go along a street of two to five straight pieces, a few metres beside it, as
recordings are: half a metre apart and exact, or 5 m apart and 2 m off.
"""

import numpy as np
import pytest
import synthetic_city as synthetic
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from test_matching import Recording, walk

from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.data.pairs import PairConfig
from cityrag_jax.geo.matching import match_path
from cityrag_jax.geo.passes import STEP_M
from cityrag_jax.geo.retrieval import index_captures
from cityrag_jax.geo.trajectory import poses_along

RECORDINGS = [Recording(0.5, 0.0), Recording(5.0, 2.0)]
SOME = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def streets(draw):
    """Corners of a street: pieces of 20 to 60 m, turns up to a right angle."""
    count = draw(st.integers(1, 4))
    heading, corners = 0.0, [np.zeros(2)]
    for _ in range(count):
        heading += np.deg2rad(draw(st.integers(-90, 90)))
        length_m = draw(st.integers(20, 60))
        step = length_m * np.array([np.sin(heading), np.cos(heading)])
        corners.append(corners[-1] + step)
    return [tuple(corner) for corner in corners]


def beside(corners, aside_m):
    return [(x + aside_m, y) for x, y in corners]


@SOME
@given(streets(), st.integers(-2, 2), st.integers(0, 99))
@pytest.mark.parametrize("recording", RECORDINGS, ids=["exact", "5m-apart-2m-off"])
def test_a_drive_reversed_covers_the_same(recording, corners, aside_m, seed):
    """A panorama sees both ways: the same places have a capture within 5 m."""
    enu, path = recording(*beside(corners, aside_m)), walk(*corners)
    poses, index = recording.city(enu, seed=seed)
    there = match_path(index, path)
    # The very same captures, from the last to the first, turned round.
    turned = poses[::-1].copy()
    turned[:, :3, [0, 2]] *= -1
    again = match_path(index_captures(turned, index.drive, index.time_s), path)
    np.testing.assert_array_equal(there.run >= 0, again.run >= 0)
    # Nodes of the path are a metre apart, and each takes the nearest capture.
    within = STEP_M + recording.spacing_m / 2
    np.testing.assert_allclose(there.distance_m, again.distance_m, atol=within)


@SOME
@given(streets(), st.integers(-2, 2))
@pytest.mark.parametrize("recording", RECORDINGS, ids=["exact", "5m-apart-2m-off"])
def test_thinning_the_corners_of_a_line_changes_nothing(recording, corners, aside_m):
    """A drawn line is what it runs along, not where it was clicked."""
    _, index = recording.city(recording(*beside(corners, aside_m)))
    clicked = [corners[0]]
    for a, b in zip(np.array(corners[:-1]), np.array(corners[1:]), strict=True):
        clicked += [tuple(a + (b - a) * part) for part in (0.25, 0.5, 0.75, 1.0)]
    few, many = (match_path(index, walk(*line)) for line in (corners, clicked))
    np.testing.assert_array_equal(few.capture, many.capture)


@SOME
@given(streets(), st.integers(1, 3), st.integers(0, 99))
def test_a_drive_doubled_loses_no_pair(corners, lane_m, seed):
    """Its captures once more behind themselves: all pairs of before are there.

    Where the street's ends are so far apart that going back is a leap, which no clip
    crosses.
    """
    assume(np.linalg.norm(corners[-1]) > PairConfig.max_step_m + 5)
    rng = np.random.default_rng(seed)
    points = [np.array([(*c, 2.0) for c in beside(corners, x)]) for x in (0, lane_m)]
    drives = [poses_along(p, 0.5 + 0.1 * rng.random()) for p in points]
    rules = PairConfig(num_frames=12, stride=1, min_condition=12, held_out=())
    once = mine_pairs(synthetic.columns(drives), "once", rules)
    twice = [np.concatenate([drives[0]] * 2), drives[1]]
    again = mine_pairs(synthetic.columns(twice), "twice", rules)
    length = len(drives[0])

    def places(pairs, copies):
        """Give windows and matches by their places in their drives, once driven."""
        starts = np.stack([pairs.start_a, pairs.start_b])
        behind = starts - copies * length
        starts = np.where(behind < 0, starts % length, behind + length)
        return np.stack([pairs.drive_a, *starts], axis=1)

    before, after = places(once, 1), places(again, 2)
    found = cKDTree(after * [1000, 1000, 1]).query(before * [1000, 1000, 1])[0]
    # The same windows. In a bend their matches may begin elsewhere by as much as the
    # lanes are apart, where many captures are about as near.
    assert len(before) and found.max() <= lane_m / 0.5 + 1
