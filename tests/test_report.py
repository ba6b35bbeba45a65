"""Pictures keep their pixels, tables their figures."""

import cv2
import numpy as np
import pytest

from cityrag_jax import report
from cityrag_jax.data.video import read_image


def test_strips_show_first_and_last_frame(rng):
    video = rng.integers(0, 255, (9, 16, 24, 3), dtype=np.uint8)
    made = report.strip(video, 3, gap=2)
    assert made.shape == (18, 78, 3)
    np.testing.assert_array_equal(made[:16, :24], video[0])
    np.testing.assert_array_equal(made[:16, 26:50], video[4])
    np.testing.assert_array_equal(made[:16, 52:76], video[8])


def test_side_by_side_repeats_a_single_picture(rng):
    video = rng.integers(0, 255, (5, 16, 24, 3), dtype=np.uint8)
    made = report.side_by_side({"first": video[:1], "all": video}, count=2)
    assert made.shape == (2 * (18 + report.LABEL_HEIGHT), 52, 3)
    np.testing.assert_array_equal(made[18:34, :24], made[18:34, 26:50])


def test_tables_are_markdown():
    made = report.table({"a": {"PSNR": 18.888}, "b": {"PSNR": 1.0}}, "mode")
    assert made.splitlines() == [
        "| mode | PSNR |",
        "|---|---|",
        "| a | 18.89 |",
        "| b | 1.00 |",
    ]
    finer = report.table({"a": {"PSNR": 18.888, "cosine": 0.98765}}, "", {"cosine": 3})
    assert finer.splitlines()[-1] == "| a | 18.89 | 0.988 |"


def test_sheets_fill_rows_and_maps_are_written(tmp_path, rng):
    images = list(rng.integers(0, 255, (3, 4, 6, 3), dtype=np.uint8))
    made = report.sheet(images, 2)
    assert made.shape == (12, 16, 3) and (made[6:, 8:] == 255).all()
    route = rng.normal(size=(5, 2))
    path = report.draw_map(tmp_path / "map.png", [route], route, route)
    assert read_image(path).shape == (600, 600, 3)


def test_text_replaces_what_was_there(tmp_path):
    for text in ("long before", "now"):
        report.write_text(tmp_path / "table.md", text)
        assert (tmp_path / "table.md").read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


def drifting(rng, frames=12) -> np.ndarray:
    """A cloudy picture that moves a pixel a frame."""
    wide = cv2.resize(rng.uniform(0, 255, (6, 12, 3)), (96 + frames, 48))
    return np.stack([wide[:, t : t + 96].astype(np.uint8) for t in range(frames)])


def test_animations_play_all_frames_beside_each_other(tmp_path, rng):
    """Read back: lossy, but within a few of 255 for smooth pictures."""
    video = drifting(rng)
    videos = {"photo": video[:1], "all": video, "twice": np.repeat(video, 2, axis=0)}
    path = report.animate(tmp_path / "a.webp", videos, 12, fps=10.0, columns=2)
    _, read = cv2.imreadanimation(str(path))
    assert len(read.frames) == 12 and list(read.durations) == [100] * 12
    line, high, wide = report.LABEL_HEIGHT, 2 * 48, 2 * 96 + 4
    assert read.frames[0].shape[:2] == (2 * (line + high + 4), 2 * wide)
    for t in (0, 5, 11):
        large = read.frames[t][..., 2::-1].astype(int)
        top, bottom = large[line : line + high], large[2 * line + high + 4 :][:high]
        shown = {"photo": top[:, : 2 * 96], "all": top[:, wide:], "twice": bottom}
        for name, moment in (("photo", 0), ("all", t), ("twice", t)):
            small = shown[name][:, : 2 * 96].reshape(48, 2, 96, 2, 3).mean((1, 3))
            assert np.abs(small - video[moment]).mean() < 5


def test_animations_stay_below_their_size_by_quality(tmp_path, rng):
    noise = {"noise": rng.integers(0, 255, (6, 48, 96, 3), dtype=np.uint8)}

    def size(name: str, **limit: int) -> int:
        path = tmp_path / name
        report.animate(path, noise, 6, fps=10.0, columns=1, **limit)
        return path.stat().st_size

    best = size("best.webp")
    assert 1000 < size("less.webp", most_bytes=best) < best
    with pytest.raises(ValueError, match="more than 1000; play fewer"):
        size("least.webp", most_bytes=1000)
    assert not (tmp_path / "least.webp").exists()
