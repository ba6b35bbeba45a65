"""Videos and pictures: round trips, whole files or none, clear refusals."""

import os
import struct
import zlib

import numpy as np
import pytest

from cityrag_jax.data import video


def moving_gradient(frames=12, height=48, width=64):
    t, y, x = np.meshgrid(
        np.arange(frames), np.arange(height), np.arange(width), indexing="ij"
    )
    picture = np.stack([4 * x + 2 * t, 5 * y, 2 * (x + y) - t], axis=-1)
    return np.clip(picture, 0, 255).astype(np.uint8)


def test_lossless_video_is_bit_exact(tmp_path, rng):
    frames = rng.integers(0, 256, (7, 33, 51, 3), dtype=np.uint8)
    video.write_video(tmp_path / "a.mp4", frames, fps=24.0, lossless=True)
    again, fps = video.read_video(tmp_path / "a.mp4")
    np.testing.assert_array_equal(again, frames)
    assert fps == 24.0 and os.listdir(tmp_path) == ["a.mp4"]


def test_lossy_video_is_close_and_keeps_count_and_rate(tmp_path):
    """30 dB on a smooth picture: 4:2:0 and crf 17 lose less."""
    frames = moving_gradient()
    video.write_video(tmp_path / "a.mp4", frames, fps=10.0)
    again, fps = video.read_video(tmp_path / "a.mp4")
    assert again.shape == frames.shape and fps == 10.0
    error = np.mean((again.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 30
    assert len(video.read_video(tmp_path / "a.mp4", max_frames=5)[0]) == 5


@pytest.mark.parametrize("suffix, tolerance", [(".png", 0), (".jpg", 12)])
def test_pictures_come_back_with_red_first(tmp_path, suffix, tolerance):
    picture = moving_gradient(1)[0]
    video.write_image(tmp_path / f"a{suffix}", picture)
    again = video.read_image(tmp_path / f"a{suffix}").astype(int)
    assert np.abs(again - picture).max() <= tolerance
    assert os.listdir(tmp_path) == [f"a{suffix}"]


def test_unreadable_files_are_named(tmp_path):
    bad = tmp_path / "bad.mp4"
    for read in (video.read_video, video.read_image):
        with pytest.raises(ValueError, match="missing.mp4 does not exist"):
            read(tmp_path / "missing.mp4")
        for content in (b"", b"not a picture"):
            bad.write_bytes(content)
            with pytest.raises(ValueError, match="bad.mp4 is not a readable"):
                read(bad)


def test_a_picture_is_not_decoded_before_its_header_is_believed(tmp_path):
    """60,000 x 20,000 pixels and a little of them: 3.6 GB, once asked for."""
    video.write_image(tmp_path / "a.png", moving_gradient(1)[0])
    content = bytearray((tmp_path / "a.png").read_bytes())
    for width, height in ((60_000, 20_000), (16_384, 8_193)):
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match="a.png is too large .* make it smaller"):
            video.read_image(tmp_path / "a.png")


def test_odd_sides_need_lossless_and_nothing_is_left_behind(tmp_path):
    frames = np.zeros((2, 33, 50, 3), np.uint8)
    with pytest.raises(ValueError, match="50x33 cannot be stored as 4:2:0"):
        video.write_video(tmp_path / "a.mp4", frames)
    with pytest.raises(ValueError, match="cannot be stored as .xyz"):
        video.write_image(tmp_path / "a.xyz", frames[0])
    assert os.listdir(tmp_path) == []
