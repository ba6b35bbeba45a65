"""Pair mining against a brute-force search, held-out parts, and clear refusals."""

import dataclasses

import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.data import mining
from cityrag_jax.data.columns import write_columns
from cityrag_jax.data.pairs import PairConfig, Pairs, load_pairs, save_pairs
from cityrag_jax.data.provenance import number_captures

SMALL = PairConfig(
    num_frames=20, stride=5, min_condition=18, min_gap_s=3600.0, held_out=()
)


def street_drives(rng):
    """Two passes of one street, one back, one across, and one 8 m beside."""
    noise = [rng.normal(0, 0.05, (n, 1)) * [[1, 1, 0]] for n in (90, 70, 90, 80, 90)]
    drives = [
        synthetic.line([0, 0, 2], 0, 90),
        synthetic.line([2.5, -1, 2], 0, 70, 0.7),
        synthetic.line([-2.0, 45, 2], 180, 90),
        synthetic.line([-20, 20, 2], 90, 80),
        synthetic.line([8.5, 0, 2], 0, 90),
    ]
    for poses, wobble in zip(drives, noise, strict=True):
        poses[:, :3, 3] += wobble
    return drives


def brute_force(captures, config) -> set:
    """Every window against every drive, the slow obvious way."""
    position = captures.ecef_from_camera[:, :3, 3]
    heading = captures.ecef_from_camera[:, :3, 2]
    steps = np.linalg.norm(np.diff(position, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    found = set()
    for start in range(len(captures) - config.num_frames + 1):
        window = np.arange(start, start + config.num_frames)
        own = captures.drive[start]
        first = np.flatnonzero(captures.drive == own)[0]
        if captures.drive[window[-1]] != own or (start - first) % config.stride:
            continue
        for drive in set(captures.drive.tolist()) - {int(own)}:
            theirs = np.flatnonzero(captures.drive == drive)
            gaps = position[window, None] - position[None, theirs]
            distances = np.linalg.norm(gaps, axis=-1)
            match = theirs[distances.argmin(1)]
            cosine = np.mean(np.sum(heading[window] * heading[match], axis=1))
            if (
                distances.min(1).mean() <= config.max_mean_distance_m
                and abs(captures.time_s[start] - captures.time_s[match[0]])
                >= config.min_gap_s
                and cosine >= np.cos(np.deg2rad(config.max_turn_deg))
                and np.diff(along[match]).min() >= -2.0
                and match[-1] > match[0]
                and theirs[-1] + 1 - match[0] >= config.min_condition
            ):
                found.add((start, int(match[0])))
    return found


def as_set(pairs: Pairs) -> set:
    return set(zip(pairs.start_a.tolist(), pairs.start_b.tolist(), strict=True))


@pytest.mark.parametrize("distance_m", [1.0, 5.0, 7.0])
def test_pairs_are_those_of_a_brute_force_search(distance_m, rng):
    config = dataclasses.replace(SMALL, max_mean_distance_m=distance_m)
    captures = synthetic.columns(street_drives(rng))
    expected = brute_force(captures, config)
    if not expected:
        with pytest.raises(ValueError, match="nearest miss"):
            mining.mine_pairs(captures, "street", config)
        return
    found = mining.mine_pairs(captures, "street", config)
    assert as_set(found) == expected and len(found) == len(expected)
    together = {(a, b) for a, b in zip(found.drive_a, found.drive_b, strict=True)}
    if distance_m == 5.0:
        assert together == {(0, 1), (1, 0)}
    assert np.all(found.drive_a == captures.drive[found.start_a])
    assert np.all(found.mean_distance_m <= distance_m)


def test_same_time_is_no_pair(rng):
    """Two cars in a row see the same weather: the gap in time keeps them apart."""
    drives = street_drives(rng)[:2]
    with pytest.raises(ValueError, match="lower min_gap_s"):
        captures = synthetic.columns(drives, times_s=[0.0, 3000.0])
        mining.mine_pairs(captures, "street", SMALL)
    captures = synthetic.columns(drives, times_s=[0.0, 3700.0])
    assert len(mining.mine_pairs(captures, "street", SMALL)) > 0


def test_a_turn_is_followed_through(rng):
    def bent(east, spacing):
        first = synthetic.line([east, 0, 2], 0, int(20 / spacing), spacing)
        second = synthetic.line([east, 20, 2], 90, int(20 / spacing), spacing)
        return np.concatenate([first, second])

    captures = synthetic.columns([bent(0, 0.5), bent(1.5, 0.41)])  # none equally near
    found = mining.mine_pairs(captures, "bend", SMALL)
    assert as_set(found) == brute_force(captures, SMALL)
    turning = (found.start_a > 22) & (found.start_a < 40) & (found.drive_a == 0)
    assert turning.any()


def test_standing_still_is_no_progress():
    still = np.repeat(synthetic.line([0, 0, 2], 0, 1), 60, axis=0)
    captures = synthetic.columns([still, synthetic.line([1, -5, 2], 0, 60)])
    with pytest.raises(ValueError, match="go another way or end too early"):
        mining.mine_pairs(captures, "stop", SMALL)


def neighbourhood_city():
    drives, names = [], []
    for k in range(10):
        for lane in (0.0, 2.0):
            drives.append(synthetic.line([lane, 200 * k, 2], 0, 60))
            names.append(k)
    return synthetic.columns(drives, neighbourhoods=names)


def test_held_out_neighbourhoods_are_chosen_once_and_for_all():
    captures = neighbourhood_city()
    by_fraction = PairConfig(
        num_frames=20, min_condition=18, held_out=None, held_out_fraction=0.2
    )
    pairs = mining.mine_pairs(captures, "ten", by_fraction)
    chosen = set(pairs.evaluation.neighbourhood.tolist())
    assert len(chosen) == 2
    assert chosen.isdisjoint(pairs.training.neighbourhood.tolist())
    assert len(pairs.training) + len(pairs.evaluation) == len(pairs)
    again = mining.choose_held_out(captures.neighbourhood, "ten", by_fraction)
    assert set(again.tolist()) == chosen
    draws = [
        mining.choose_held_out(captures.neighbourhood, name, by_fraction).tolist()
        for name in "abcdefgh"
    ]
    assert len(set(map(tuple, draws))) > 3  # each city draws its own


def test_explicit_list_whole_city_and_nothing_held_out():
    captures = neighbourhood_city()
    for held_out, fraction, count in (
        ((3, 7), 0.0, 2),
        (None, 1.0, 10),
        (None, 0.0, 0),
    ):
        config = PairConfig(
            num_frames=20,
            min_condition=18,
            held_out=held_out,
            held_out_fraction=fraction,
        )
        pairs = mining.mine_pairs(captures, "ten", config)
        assert len(set(pairs.evaluation.neighbourhood.tolist())) == count
    with pytest.raises(ValueError, match=r"has no neighbourhoods \[42\]"):
        mining.mine_pairs(captures, "ten", PairConfig(held_out=(42,)))
    with pytest.raises(ValueError, match="held_out_fraction is 2.0"):
        mining.choose_held_out(
            captures.neighbourhood, "x", PairConfig(held_out_fraction=2.0)
        )


def test_no_training_pair_shows_a_held_out_capture():
    """A drive that leaves a held-out neighbourhood: windows on the border go."""
    drives = [synthetic.line([x, 0, 2], 0, 200) for x in (0.0, 2.0)]
    captures = synthetic.columns(drives)
    border = (np.arange(400) % 200 >= 100).astype(np.int32)
    captures = dataclasses.replace(captures, neighbourhood=border)
    config = dataclasses.replace(SMALL, held_out=(1,))
    pairs = mining.mine_pairs(captures, "border", config)
    for start in pairs.training.start_a:
        assert not border[start : start + 20].any()
    for start in pairs.training.start_b:
        assert not border[start : start + 40].any()
    for start in pairs.evaluation.start_a:
        assert border[start : start + 20].all()
    everything = mining.mine_pairs(captures, "border", SMALL)
    assert 0 < len(pairs.training) and 0 < len(pairs.evaluation)
    assert len(pairs) < len(everything)


def test_errors_name_the_city_the_parameters_and_the_nearest_miss(rng):
    drives = street_drives(rng)
    far = synthetic.columns([drives[0], drives[4]])
    with pytest.raises(ValueError) as error:
        mining.mine_pairs(far, "Far Away", SMALL)
    message = str(error.value)
    assert message.startswith("Far Away has no pairs")
    assert "max_mean_distance_m=5.0" in message and "num_frames=20" in message
    assert "keeps 8.4" in message and "raise max_mean_distance_m" in message
    with pytest.raises(ValueError, match="No drive is as long as num_frames"):
        mining.mine_pairs(far, "short", PairConfig(num_frames=91))


def test_pairs_come_back_from_disk(tmp_path, rng):
    captures = synthetic.columns(street_drives(rng))
    found = mining.mine_pairs(captures, "street", SMALL)
    provenance = number_captures(captures)
    write_columns(tmp_path, synthetic.header(), captures, provenance)
    with pytest.raises(ValueError, match="pairs.parquet is missing; mine pairs with"):
        load_pairs(tmp_path)
    save_pairs(tmp_path, found)
    again = load_pairs(tmp_path)
    assert as_set(again) == as_set(found) and again.num_frames == 20
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["captures.parquet", "pairs.parquet"]
    other = dataclasses.replace(captures, neighbourhood=captures.drive)
    write_columns(tmp_path, synthetic.header(), other, provenance)
    with pytest.raises(ValueError, match="mined from other captures .*mine pairs aga"):
        load_pairs(tmp_path)
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pairs.parquet is damaged"):
        load_pairs(tmp_path)


def raised(drive, height_m):
    return drive + height_m * np.eye(4)[2][:, None] * np.eye(4)[3][None]


def test_heights_of_satellites_part_no_pair_but_bridges_do():
    """A drive's heights are off by one number; a ramp leads to another street."""
    one, two = synthetic.line([0, 0, 2], 0, 90), synthetic.line([2, 0, 2], 0, 90)
    level = mining.mine_pairs(synthetic.columns([one, two]), "flat", SMALL)
    off = mining.mine_pairs(synthetic.columns([one, raised(two, 9.0)]), "off", SMALL)
    assert as_set(off) == as_set(level) and len(level) > 20
    np.testing.assert_allclose(off.mean_distance_m, level.mean_distance_m, atol=1e-3)
    ramp = two.copy()
    ramp[45:, 2, 3] += np.linspace(0, 16, 45)
    partly = mining.mine_pairs(synthetic.columns([one, ramp]), "ramp", SMALL)
    assert (
        0 < len(partly) < len(level) and partly.start_a[partly.drive_a == 0].max() < 50
    )
    bridge = synthetic.columns([one, raised(two, 18.0)])
    with pytest.raises(ValueError, match="go another way"):
        mining.mine_pairs(bridge, "bridge", SMALL)


def test_no_window_leaps_over_a_gap():
    """Both drives lost 40 m at one place; nothing there may be shown as driven."""
    drives = [synthetic.line([e, 0, 2], 0, 160) for e in (0.0, 1.5)]
    lost = [np.delete(d, slice(60, 140), axis=0) for d in drives]
    found = mining.mine_pairs(synthetic.columns(lost), "gap", SMALL)
    place = np.concatenate(lost)[:, 1, 3]
    for start in (found.start_a, found.start_b):
        assert (np.abs(place[start + 10] - place[start]) < 6).all()
    assert len(found) > 10


def test_noise_of_half_a_metre_takes_no_pair(rng):
    """Captures 0.3 m apart are then out of order by several; metres do not care."""
    drives = [synthetic.line([e, 0, 2], 0, 120, 0.3) for e in (0.0, 1.5)]
    clean = len(mining.mine_pairs(synthetic.columns(drives), "clean", SMALL))
    for drive in drives:
        drive[:, :2, 3] += rng.normal(0, 0.3, (120, 2))
    noisy = mining.mine_pairs(synthetic.columns(drives), "noisy", SMALL)
    assert len(noisy) >= 0.75 * clean


def test_training_keeps_away_from_held_out_streets():
    """Panoramas 20 m before the line would look along the held-out street."""
    drives = [synthetic.line([e, 0, 2], 0, 400) for e in (0.0, 1.5)]
    captures = synthetic.columns(drives)
    place = np.concatenate(drives)[:, 1, 3]
    north = (place > 140).astype(np.int32)
    captures = dataclasses.replace(captures, neighbourhood=north)
    config = dataclasses.replace(SMALL, held_out=(1,))
    near = mining.mine_pairs(captures, "near", config)
    far = mining.mine_pairs(
        captures, "far", dataclasses.replace(config, buffer_m=100.0)
    )
    assert as_set(far.evaluation) == as_set(near.evaluation)
    assert place[near.training.start_a + 19].max() > 125
    assert 20 < place[far.training.start_a + 19].max() < 41


def there_and_back(east, lane, num=120):
    """A drive up a street in its lane and, three metres to the left, down again."""
    up = synthetic.line([east, 0, 2], 0, num)
    return np.concatenate([up, synthetic.line([east - lane, num / 2, 2], 180, num)])


def test_a_drive_that_comes_back_loses_no_pair():
    """What people record: up the street and down again, on two days."""
    one_way = [d[:120] for d in (there_and_back(0, 3), there_and_back(1.4, 3))]
    alone = mining.mine_pairs(synthetic.columns(one_way), "up", SMALL)
    both = [there_and_back(0, 3), there_and_back(1.4, 3)]
    found = mining.mine_pairs(synthetic.columns(both), "both", SMALL)
    up = found.start_a % 240 <= 100
    assert up.sum() >= len(alone) and len(found) >= 1.9 * len(alone)
    assert (found.start_b[up] % 240 < 120).all()  # never the way back
    # Nor where the other day drove between the two lanes.
    middle = [there_and_back(0, 3), there_and_back(-1.5, 0.2)]
    between = mining.mine_pairs(synthetic.columns(middle), "between", SMALL)
    assert len(between) >= 1.8 * len(alone)


def test_every_pass_of_a_drive_is_a_pair():
    """A second lap beside the first, on one drive: each window has both."""
    lap = synthetic.line([0, 0, 2], 0, 100)
    again = synthetic.line([2.5, 0, 2], 0, 100)
    around = [
        synthetic.line([0, 50, 2], 90, 160),
        synthetic.line([80, 50, 2], 180, 100),
        synthetic.line([80, 0, 2], 270, 155),
    ]
    twice = np.concatenate([lap, *around, again])
    single = synthetic.line([1.2, 0, 2], 0, 100)
    found = mining.mine_pairs(synthetic.columns([single, twice]), "laps", SMALL)
    of_single = found.select(found.drive_a == 0)
    second = of_single.start_b >= 100 + len(twice) - 100
    assert second.sum() == (~second).sum() >= 12
    assert set(of_single.start_a[second]) == set(of_single.start_a[~second])
    config = dataclasses.replace(SMALL, every_pass=False)
    assert len(mining.mine_pairs(synthetic.columns([single, twice]), "x", config)) < (
        len(found)
    )


def test_clips_of_no_frames_and_windows_without_a_step_are_refused():
    for wrong in (dict(num_frames=0), dict(stride=0)):
        with pytest.raises(ValueError, match="a clip has 2 frames or more"):
            PairConfig(**wrong)
