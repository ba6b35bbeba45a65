"""What cameras write into pictures is read as it was meant."""

import math

import numpy as np
import pytest
import tagged_pictures as tagged

from cityrag_jax.importers import tags
from cityrag_jax.importers.tags import read_tags

SMALL = np.zeros((32, 64, 3), np.uint8)
TIME_S = 1.7e9 + 0.25


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_places_come_back_in_every_format(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    place = (-33.868823, 151.209295)
    tagged.save(
        path, SMALL, place=place, height_m=-3.5, heading_deg=271.5, time_s=TIME_S
    )
    read = read_tags(path)
    assert (read.width, read.height) == (64, 32)
    assert read.latitude_deg == pytest.approx(place[0], abs=1e-8)
    assert read.longitude_deg == pytest.approx(place[1], abs=1e-8)
    assert (read.height_m, read.heading_deg, read.time_s) == (-3.5, 271.5, TIME_S)
    assert read.time_is_utc and not read.magnetic and read.window is None


def test_silent_pictures_know_nothing(tmp_path):
    tagged.save(tmp_path / "a.jpg", SMALL)
    read = read_tags(tmp_path / "a.jpg")
    assert all(
        math.isnan(getattr(read, n)) for n in ("time_s", "latitude_deg", "fov_deg")
    )


def test_no_satellites_is_no_place(tmp_path):
    """Cameras without a fix write 0, 0."""
    tagged.save(tmp_path / "a.jpg", SMALL, place=(0.0, 0.0))
    assert math.isnan(read_tags(tmp_path / "a.jpg").latitude_deg)


def test_times_of_other_zones(tmp_path):
    """The zone is told, or is the difference to the satellites' clock, or unknown."""
    for k, kinds in enumerate(
        ({"zone": "+05:00"}, {"zone": "-03:00"}, {"zone": "-03:00", "gps_time": True})
    ):
        tagged.save(tmp_path / f"{k}.jpg", SMALL, time_s=TIME_S, **kinds)
        read = read_tags(tmp_path / f"{k}.jpg")
        assert read.time_s == pytest.approx(TIME_S, abs=1e-3) and read.time_is_utc
    tagged.save(tmp_path / "none.jpg", SMALL, time_s=TIME_S, zone="")
    read = read_tags(tmp_path / "none.jpg")
    assert read.time_s == TIME_S and not read.time_is_utc


def test_gpano_wins_over_a_compass_and_tells_what_is_shown(tmp_path):
    sizes = {"FullPanoWidthPixels": 400, "FullPanoHeightPixels": 200}
    sizes |= {"CroppedAreaLeftPixels": 0, "CroppedAreaTopPixels": 40}
    sizes |= {"CroppedAreaImageWidthPixels": 400, "CroppedAreaImageHeightPixels": 100}
    xmp = tagged.gpano(PoseHeadingDegrees=12.5, PosePitchDegrees=-3, **sizes)
    tagged.save(tmp_path / "a.jpg", SMALL, xmp=xmp, heading_deg=200, magnetic=True)
    read = read_tags(tmp_path / "a.jpg")
    assert (read.heading_deg, read.pitch_deg, read.magnetic) == (12.5, -3.0, False)
    assert read.window == tags.Window(400, 200, 0, 40, 400, 100)
    elements = xmp.replace(b' GPano:PoseHeadingDegrees="12.5"', b"").replace(
        b"/></rdf:RDF>",
        b"><GPano:PoseHeadingDegrees>99</GPano:PoseHeadingDegrees>"
        b"</rdf:Description></rdf:RDF>",
    )
    elements = elements.replace(b'GPano:PoseHeadingDegrees="12.5" ', b"")
    tagged.save(tmp_path / "b.jpg", SMALL, xmp=elements)
    assert read_tags(tmp_path / "b.jpg").heading_deg == 99.0


def test_a_lens_of_50_mm_and_a_picture_on_its_side(tmp_path):
    tagged.save(tmp_path / "a.jpg", SMALL, focal_mm=50, orientation=6)
    read = read_tags(tmp_path / "a.jpg")
    assert (read.width, read.height) == (32, 64)
    half = math.hypot(36, 24) / 2 / 50 * 32 / math.hypot(32, 64)
    assert read.fov_deg == pytest.approx(2 * math.degrees(math.atan(half)))


def test_broken_tags_are_silent_and_broken_pictures_refused(tmp_path):
    tagged.save(tmp_path / "a.jpg", SMALL, xmp=b"<x:xmpmeta><", place=(48.0, 11.0))
    assert read_tags(tmp_path / "a.jpg").projection is None
    (tmp_path / "b.jpg").write_bytes(b"hello")
    with pytest.raises(ValueError, match="b.jpg is not a readable picture"):
        read_tags(tmp_path / "b.jpg")


def test_a_picture_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    tagged.save(tmp_path / "a.png", SMALL)
    monkeypatch.setattr(tags, "MOST_PIXELS", 2000)
    with pytest.raises(ValueError, match="has 64x32 pixels, more than 2000"):
        read_tags(tmp_path / "a.png")
