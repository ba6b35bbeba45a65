"""How long streets are, and how often they were driven, by count."""

import numpy as np
import pytest

from cityrag_jax.geo import revisits

DAY = 86_400.0


def drive(start, end, spacing=1.0):
    start, end = np.array(start, float), np.array(end, float)
    count = round(np.linalg.norm(end - start) / spacing) + 1
    return start + np.linspace(0, 1, count)[:, None] * (end - start)


def find(drives, times_s, **kinds):
    place_m = np.concatenate(drives)
    lengths = [len(d) for d in drives]
    number = np.repeat(np.arange(len(drives)), lengths)
    time_s = np.concatenate(
        [t + np.arange(n) for t, n in zip(times_s, lengths, strict=True)]
    )
    return revisits.find_revisits(place_m, number, time_s, gap_s=7200.0, **kinds)


@pytest.mark.parametrize("spacing", [0.5, 5.0])
def test_a_street_counts_once_however_often_it_is_driven(spacing):
    """Three drives along 400 m, one of them back, the last an hour after the second;
    and 200 m that one of them drove alone."""
    there = drive((0, 0), (400, 0), spacing)
    back = drive((600, 2), (0, 2), spacing)
    again = drive((0, -1), (400, -1), spacing)
    found = find([there, back, again], [0, DAY, DAY + 3600])
    # Beside the end of the others, within 10 m, a step counts with theirs.
    assert found.metres() == pytest.approx(600, abs=10)
    assert found.metres(found.times > 1) == pytest.approx(400, abs=15)
    assert found.times.max() == 2  # an hour is not another time
    alone = revisits.join_steps(found, found.times == 1)
    assert len(alone) == 1
    place_m = np.concatenate([there, back, again])[alone[0]]
    assert place_m[:, 0].min() > 400 and place_m[:, 0].max() == 600


def test_up_and_down_in_one_drive_is_one_time_and_one_street():
    way = np.concatenate([drive((0, 0), (300, 0)), drive((300, 3), (0, 3))])
    found = find([way], [0.0])
    # The last 10 m before the turn, and the turn, are one pass through their circle.
    assert 300 <= found.metres() < 300 + 15
    assert found.times.max() == 1
    assert find([way[:1]], [0.0]).metres() == 0  # one picture is no street
    gap = np.concatenate([drive((0, 0), (50, 0)), drive((900, 0), (950, 0))])
    assert find([gap], [0.0]).metres() == pytest.approx(100)


def test_a_part_stands_for_all_where_there_is_much(monkeypatch):
    streets = [drive((0, 50.0 * k), (500, 50.0 * k)) for k in range(6)]
    times = [DAY * k for k in range(6)]
    whole = find(streets + [streets[0] + (0, 2)], [*times, 9 * DAY])
    monkeypatch.setattr(revisits, "MOST", 400)
    part = find(streets + [streets[0] + (0, 2)], [*times, 9 * DAY])
    assert len(part.row) < 0.15 * len(whole.row)
    assert part.metres() == pytest.approx(whole.metres(), rel=0.02)
    twice = part.metres(part.times > 1)
    assert twice == pytest.approx(whole.metres(whole.times > 1), rel=0.05)
    assert len(revisits.join_steps(part, part.times > 1)) == 2
