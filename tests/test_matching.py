"""Map matching: drives whose truth is known, exact and as real recordings are.

Every case runs twice: with captures half a metre apart where they were taken, and 5 m
apart with a position error of 2 m that changes over 60 m of driving, as GPS does.
"""

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.geo.grounding import Retrieval, check_gaps, clip_views, ground_path
from cityrag_jax.geo.matching import Costs, fill_heights, match_path
from cityrag_jax.geo.retrieval import index_captures
from cityrag_jax.geo.trajectory import headings, level_poses, poses_along, resample_path

ANCHOR = ecef_from_enu(35.68, 139.76, 40.0)
FINE_M, NORTH, EAST = 0.5, 0.0, np.pi / 2


@dataclasses.dataclass(frozen=True)
class Recording:
    """How drives were recorded: spacing, and size of the position error."""

    spacing_m: float
    error_m: float

    def __call__(self, *corners, stop=0):
        """Drive along corners (east, north[, up]); stand `stop` captures halfway."""
        points = np.array([(*c, 2.0)[:3] if len(c) < 3 else c for c in corners], float)
        enu = poses_along(points, self.spacing_m)
        middle = len(enu) // 2
        return np.insert(enu, [middle] * stop, enu[middle], axis=0)

    def city(self, *drives, times_s=None, seed=0):
        """Index drives, each a day after the last, with this recording's error."""
        rng, noisy = np.random.default_rng(seed), []
        for enu in drives:
            enu = enu.copy()
            if self.error_m:
                width = 30 / self.spacing_m
                error = rng.normal(size=(len(enu), 2))
                error = gaussian_filter1d(error, width, axis=0, mode="nearest")
                # The filter's own gain, so that the error is what it is said to be.
                error *= self.error_m * np.sqrt(2 * np.sqrt(np.pi) * width)
                enu[:, :2, 3] += error / np.sqrt(2)
            noisy.append(ANCHOR @ enu)
        drive = np.repeat(np.arange(len(drives)), [len(d) for d in drives])
        times_s = times_s or [1.7e9 + 86400.0 * k for k in range(len(drives))]
        time_s = np.asarray(times_s)[drive] + 0.1 * np.arange(len(drive))
        poses = np.concatenate(noisy)
        return poses, index_captures(poses, drive.astype(np.int32), time_s)


@pytest.fixture(params=[(0.5, 0.0), (5.0, 2.0)], ids=["exact", "5m-apart-2m-off"])
def drive(request) -> Recording:
    return Recording(*request.param)


def walk(*corners, spacing=0.5):
    """Make the path's poses on Earth through corners, 2 m up."""
    points = np.array([(*c, 2.0) for c in corners], float)
    return ANCHOR @ poses_along(points, spacing)


def drives_of(index, match) -> list[int]:
    """List drives in the order in which they show the path."""
    drives = index.drive[match.capture[match.run >= 0]]
    return drives[np.diff(drives, prepend=-1) != 0].tolist()


def assert_follows(index, path, match, drive, within=2.0):
    """Every pose has a capture as near as the recording allows, and none jumps back."""
    views = ground_path(index, path, match)
    assert len(views) == len(path)
    slack = within + drive.spacing_m / 2 + 2.5 * drive.error_m
    assert views.distance_m.max() < slack
    return views


def test_the_nearest_drive_is_followed_to_the_end(drive):
    _, index = drive.city(
        drive((0, -20), (0, 120)), drive((9, -20), (9, 120)), drive((-20, 0), (80, 0))
    )
    path = walk((1, 0), (1, 100))
    match = match_path(index, path)
    assert drives_of(index, match) == [0]
    assert match.jumps == 0 and match.gaps() == []
    assert_follows(index, path, match, drive)


def test_figure_5_a_turn_that_no_drive_makes_is_stitched_of_two(drive):
    _, index = drive.city(drive((0, -80), (0, 80)), drive((-80, 0), (80, 0)))
    path = walk((0, -60), (0, 0), (60, 0))
    match = match_path(index, path)
    assert drives_of(index, match) == [0, 1] and match.jumps == 1
    switch = np.flatnonzero(np.diff(match.run))[0]
    assert abs(switch - 60) < 10  # at the crossing
    assert_follows(index, path, match, drive)


def test_a_route_of_four_drives_is_stitched_of_four(drive):
    _, index = drive.city(
        drive((0, -40), (0, 140)),
        drive((-40, 100), (140, 100)),
        drive((100, 140), (100, -40)),
        drive((40, 0), (240, 0)),
    )
    path = walk((0, 0), (0, 100), (100, 100), (100, 0), (200, 0))
    match = match_path(index, path)
    assert drives_of(index, match) == [0, 1, 2, 3] and match.jumps == 3
    assert_follows(index, path, match, drive)


def test_a_drive_that_passes_twice_serves_both_ways(drive):
    """Out on one lane and back on the other, as people record their own street."""
    _, index = drive.city(drive((0, -40), (0, 200), (6, 200), (6, -40)))
    for east, north, backward in (0, (0, 120), False), (6, (120, 0), False):
        path = walk((east, north[0]), (east, north[1]))
        match = match_path(index, path)
        assert match.jumps == 0 and match.gaps() == []
        assert match.backward.any() == backward
        assert_follows(index, path, match, drive)


def test_a_drive_against_the_path_serves_and_faces_with_it(drive):
    poses, index = drive.city(drive((0, 140), (0, -40)))
    path = walk((1, 0), (1, 100))
    match = match_path(index, path)
    assert match.backward.all() and match.gaps() == []
    views = assert_follows(index, path, match, drive)
    assert np.all(np.diff(views.captures) <= 0)
    np.testing.assert_allclose(views.heading_rad, headings(path), atol=1e-9)
    driven = ground_path(index, path, match, "as-driven")
    assert np.all(np.diff(driven.captures) == -1)


def test_with_the_drive_is_preferred_to_against_it(drive):
    _, index = drive.city(drive((0, 140), (0, -40)), drive((0, -40), (0, 140)))
    match = match_path(index, walk((0, 0), (0, 100)))
    assert drives_of(index, match) == [1]


def test_a_turning_back_path_turns_back_on_the_same_drive(drive):
    _, index = drive.city(drive((0, -40), (0, 140)))
    path = walk((0, 0), (0, 80), (3, 80), (3, 0))
    match = match_path(index, path)
    assert match.jumps == 0 and match.gaps() == []
    half = len(match.run) // 2
    assert not match.backward[: half - 5].any() and match.backward[half + 5 :].all()
    assert_follows(index, path, match, drive, within=4.0)


def test_a_loop_comes_round_to_its_start(drive):
    block = [(0, 0), (0, 80), (80, 80), (80, 0), (0, 0)]
    _, index = drive.city(drive(*block, (0, 80), (80, 80)))
    path = walk(*block, (0, 40))
    match = match_path(index, path)
    assert match.gaps() == [] and match.jumps <= 1
    views = assert_follows(index, path, match, drive)
    moved = index.position_m[views.captures[0]] - index.position_m[views.captures[-1]]
    assert np.linalg.norm(moved) > 20  # the path ends 40 m up its first street


def test_a_standing_drive_stands_as_driven_and_moves_by_distance(drive):
    """With 100 captures at a red light: both ways measured."""
    _, index = drive.city(drive((0, -20), (0, 120), stop=100))
    path = walk((0, 40), (0, 90))
    match = match_path(index, path)
    assert match.jumps == 0 and match.gaps() == []
    even = clip_views(ground_path(index, path, match), 0, 81)
    moved_m = np.diff(index.position_m[even.captures], axis=0)
    longest_m = np.linalg.norm(index.position_m[even.captures[-1]] - path[80, :3, 3])
    assert longest_m < 1 + drive.spacing_m + 2.5 * drive.error_m
    assert np.linalg.norm(moved_m, axis=1).max() < 1 + 2 * drive.spacing_m
    driven = ground_path(index, path, match, "as-driven")[:81]
    assert np.all(np.diff(driven.captures) == 1) and len(driven) == 81
    standing = np.diff(index.position_m[driven.captures], axis=0)
    standing = np.linalg.norm(standing, axis=1) < 0.5 * drive.spacing_m
    assert standing.sum() > 30


def test_a_gap_is_found_and_said(drive):
    _, index = drive.city(drive((0, -40), (0, 50)), drive((0, 110), (0, 200)))
    path = walk((0, 0), (0, 160))
    match = match_path(index, path)
    ((first, behind),) = match.gaps()
    reach = Costs().radius_m
    slack = 1.5 + drive.spacing_m + 2.5 * drive.error_m
    assert abs(first - (50 + reach)) < slack and abs(behind - (110 - reach)) < slack
    with pytest.raises(ValueError, match=r"nothing was captured along [67]\d to"):
        check_gaps(index, path, match, len(path) - 1)
    check_gaps(index, path, match, 120)  # of the first 60 m nothing is missing
    views = ground_path(index, path, match)
    assert np.isin(views.frame, np.arange(len(path))).all() and len(views) < len(path)


def test_a_bridge_is_not_the_street_below_it(drive):
    """The street was not driven under the bridge: nothing is better than the deck."""
    over = drive((-60, 60, 9.0), (60, 60, 9.0))
    _, index = drive.city(drive((0, -40), (0, 30)), drive((0, 90), (0, 200)), over)
    path = walk((0, 0), (0, 160))
    match = match_path(index, path)
    assert drives_of(index, match) == [0, 1]
    # At street level the same crossing serves.
    level = drive((-60, 60, 2.5), (60, 60, 2.5))
    _, index = drive.city(drive((0, -40), (0, 30)), drive((0, 90), (0, 200)), level)
    assert drives_of(index, match_path(index, path)) == [0, 2, 1]


def test_a_drive_with_a_height_of_its_own_is_no_bridge(drive):
    """GPS altitudes of two days differ by 6 m; the stitch is made, the path is flat."""
    _, index = drive.city(drive((0, -80), (0, 80)), drive((-80, 0, 8.0), (80, 0, 8.0)))
    match = match_path(index, walk((0, -60), (0, 0), (60, 0)))
    assert drives_of(index, match) == [0, 1]
    assert np.ptp(match.height_m) < 0.5


def test_years_and_seasons_decide_between_equals(drive):
    year, both = 365.25 * 86400, [(0, -40), (0, 140)]
    now = 1.7e9
    path = walk((0, 0), (0, 100))
    drives = drive(*both), drive(*both)
    exact = dataclasses.replace(drive, error_m=0.0)
    _, index = exact.city(*drives, times_s=[now - 8 * year, now])
    assert drives_of(index, match_path(index, path)) == [1]
    assert drives_of(index, match_path(index, path, Costs(when_s=now - 7 * year))) == [
        0
    ]
    _, index = exact.city(*drives, times_s=[now - 1.0 * year, now - 0.5 * year])
    assert drives_of(index, match_path(index, path, Costs(when_s=now))) == [0]


def test_captures_that_are_not_allowed_are_never_shown(drive):
    _, index = drive.city(drive((0, -40), (0, 140)), drive((3, -40), (3, 140)))
    path = walk((0, 0), (0, 100))
    match = match_path(index, path, allowed=index.drive == 1)
    assert drives_of(index, match) == [1]
    nothing = match_path(index, path, allowed=index.drive == 2)
    assert nothing.gaps() == [(0, len(nothing.run))] and nothing.jumps == 0
    assert len(ground_path(index, path, nothing)) == 0
    assert len(ground_path(index, path, nothing, "as-driven")) == 0


def test_looking_around_shows_one_place_from_all_sides(drive):
    """A path that stands and turns: one capture, every heading."""
    _, index = drive.city(drive((0, -40), (0, 140)))
    turn = np.linspace(0, 2 * np.pi, 81)
    path = ANCHOR @ level_poses(np.tile([0.5, 20.0, 2.0], (81, 1)), turn)
    views = ground_path(index, path, match_path(index, path))
    assert len(np.unique(views.captures)) == 1 and len(views) == 81
    # North turns by 6e-8 over the 20 m from the anchor.
    np.testing.assert_allclose(views.heading_rad, turn, atol=1e-6)


def test_a_path_over_a_hill_lies_on_the_street(drive):
    """Two points, a 15 per cent hill between: heights unknown, zero, of the sea."""
    hill = np.array([(0, 0, 2), (0, 150, 24.5), (0, 300, 2.0)])
    places = resample_path(hill, drive.spacing_m)
    enu = level_poses(places, np.zeros(len(places)))
    _, index = drive.city(enu)
    ends = (ANCHOR @ level_poses(hill[[0, 2]], np.zeros(2)))[:, :3, 3]
    latitude, longitude, height = geodetic_from_ecef(ends)
    for given in np.full(2, np.nan), np.zeros(2), height - 46.0:
        path = fill_heights(index, np.stack([latitude, longitude, given], -1))
        top = path[np.argmin(np.abs(path[:, 0] - latitude.mean())), 2]
        # 2.5 m of slack: a spacing of 5 m cuts the top, 2 m along it are 0.3 m high.
        assert top == pytest.approx(40 + 24.5, abs=0.2 + 0.2 * drive.spacing_m)
    corners = (ANCHOR @ level_poses(hill, np.zeros(3)))[:, :3, 3]
    latitude, longitude, height = geodetic_from_ecef(corners)
    own = fill_heights(index, np.stack([latitude, longitude, height + 1.0], -1))
    assert own[0, 2] == pytest.approx(height[0] + 1.0)


def test_more_corners_on_the_same_line_change_nothing(drive):
    _, index = drive.city(drive((0, -80), (0, 80)), drive((-80, 0), (80, 0)))
    few = match_path(index, walk((0, -60), (0, 0), (60, 0)))
    many = [(0, y) for y in range(-60, 1, 5)] + [(x, 0) for x in range(5, 61, 5)]
    again = match_path(index, walk(*many))
    np.testing.assert_array_equal(few.capture, again.capture)


def test_a_drive_reversed_covers_the_same(drive):
    there = drive((0, -40), (0, 50), (60, 50))
    back = there[::-1].copy()
    path = walk((0, 0), (0, 50), (50, 50))
    exact = dataclasses.replace(drive, error_m=0.0)
    distances = []
    for enu in there, back:
        _, index = exact.city(enu)
        distances.append(match_path(index, path).distance_m)
    np.testing.assert_allclose(*distances, atol=0.3)  # where nodes are thinned


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="by-distance, as-driven"):
        Retrieval("by-magic")
    with pytest.raises(ValueError, match="refuse, without-geo"):
        Retrieval(gaps="ignore")
    with pytest.raises(ValueError, match="radius_m is -1.0"):
        Retrieval(radius_m=-1.0)
