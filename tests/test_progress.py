"""What a log says of something long, where there is no terminal for a bar."""

import re

from cityrag_jax import progress
from cityrag_jax.progress import Progress, describe_speed, tracked


def test_a_log_gets_lines_with_time_done_speed_and_time_left(monkeypatch, capsys):
    """No bar, and nothing at all of what is soon done."""
    assert list(tracked("abc", "quick", 3, "clip")) == list("abc")
    assert capsys.readouterr() == ("", "")
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with Progress("scoring", 8, "clip") as bar:
        bar.remark("geo")
        for _ in range(8):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    clock = r"\d\d:\d\d:\d\d scoring: "
    assert re.fullmatch(
        clock + r"3 of 8 clips, 13.3 s a clip, 67 s left \(geo\)", lines[0]
    )
    assert re.fullmatch(clock + r"8 of 8 clips, [0-9.]+ s a clip", lines[-1])
    assert 3 <= len(lines) <= 4 and "\r" not in "".join(lines)


def test_what_other_processes_do_is_not_shown(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with Progress("scoring", 8, "clip", shown=False) as bar:
        bar.update(8)
    assert capsys.readouterr() == ("", "")
    assert describe_speed(3.25, "pano") == "3.2 a second"
    assert describe_speed(3.1e8, "byte") == "0.31 GB a second"
