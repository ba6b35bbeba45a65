"""A 360-degree video and a track become a city, whatever the camera's clock says."""

import datetime
import importlib.util
import json
import pathlib

import av
import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.data.store import City
from cityrag_jax.data.video import frames_at, read_frames, read_times, write_video
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.geo.trajectory import headings, level_poses
from cityrag_jax.importers import film, recordings

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "build_city.py"
BEGAN, FPS, HEIGHT = 1.7e9, 10.0, 64  # Unix time; of the video
RNG = np.random.default_rng(5)
SHADES = RNG.integers(30, 225, (4, 64, 64), np.uint8)


def speed_at(time_s):
    """Drive off, stop at a light, drive on faster; the recording begins standing."""
    stops = [(0, 3, 0), (3, 12, 4.0), (12, 16, 0), (16, 30, 7.0), (30, 34, 2.0)]
    return sum(v * ((time_s >= a) & (time_s < b)) for a, b, v in stops)


def along_m(time_s):
    grid = np.arange(0, 60, 0.01)
    way = np.concatenate([[0.0], np.cumsum(speed_at(grid))[:-1] * 0.01])
    return np.interp(time_s, grid, way)


def pose_at(way_m):
    """Go north-east through a street of painted walls."""
    way_m = np.atleast_1d(way_m)
    north_east = np.array([np.sin(np.pi / 4), np.cos(np.pi / 4), 0.0])
    places = np.array([0.0, 0.0, 2.0]) + way_m[:, None] * north_east
    return level_poses(places, np.full(len(way_m), np.pi / 4))


def street_panorama(way_m):
    """Paint a street 12 m wide and 8 m high: each wall a texture of its own."""
    longitude = np.pi * ((np.arange(2 * HEIGHT) + 0.5) / HEIGHT - 1)
    down = np.pi * ((np.arange(HEIGHT) + 0.5) / HEIGHT - 0.5)
    across = np.cos(down)[:, None] * np.sin(longitude)
    ahead = np.cos(down)[:, None] * np.cos(longitude)
    rise = np.broadcast_to(-np.sin(down)[:, None], across.shape)
    to_side = 6 / np.maximum(np.abs(across), 1e-6)
    to_flat = np.where(rise > 0, 6, 2) / np.maximum(np.abs(rise), 1e-6)
    far = np.minimum(np.minimum(to_side, to_flat), 60)
    u = (way_m + far * ahead) / 1.5
    v = np.where(to_side < to_flat, far * rise, far * across) / 1.5
    wall = np.where(to_side < to_flat, across > 0, 2 + (rise > 0))
    shade = SHADES[wall, u.astype(int) % 64, v.astype(int) % 64]
    return np.stack([shade, shade // 2, 255 - shade], -1).astype(np.uint8)


def write_track(path, time_s, way_m):
    points = []
    for moment, pose in zip(time_s.tolist(), pose_at(way_m), strict=True):
        ecef = ecef_from_enu(*synthetic.ANCHOR) @ pose
        latitude, longitude, height_m = geodetic_from_ecef(ecef[:3, 3])
        told = datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()
        points.append(
            f'<trkpt lat="{latitude:.9f}" lon="{longitude:.9f}"><ele>{height_m:.2f}'
            f"</ele><time>{told}</time></trkpt>"
        )
    path.write_text(f"<gpx><trk><trkseg>{''.join(points)}</trkseg></trk></gpx>")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A video of 34 s whose clock is 100 s slow; its track, longer at both ends."""
    path = tmp_path_factory.mktemp("film")
    time_s = np.arange(0, 34, 1 / FPS)
    frames = np.stack([street_panorama(way_m) for way_m in along_m(time_s)])
    write_video(path / "plain.mp4", frames, FPS)
    told = datetime.datetime.fromtimestamp(BEGAN - 100, datetime.UTC).isoformat()
    with av.open(str(path / "plain.mp4")) as plain:
        with av.open(str(path / "ride.mp4"), "w") as ride:
            ride.metadata["creation_time"] = told.replace("+00:00", "Z")
            stream = ride.add_stream_from_template(plain.streams.video[0])
            for packet in plain.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    ride.mux(packet)
    (path / "plain.mp4").unlink()
    seconds = np.arange(-20, 55.0)
    write_track(path / "ride.gpx", BEGAN + seconds, along_m(seconds))
    return path


def build(*words):
    spec = importlib.util.spec_from_file_location("build_city", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(tool.COMMAND.parse([*map(str, words)]))


@pytest.mark.long
def test_a_video_and_its_track_become_a_city(recorded, tmp_path, capsys):
    """Its clock is found by speed; frames come by metres, and each in its place."""
    out = tmp_path / "city"
    build(
        *("--source=video", f"--from={recorded / 'ride.mp4'}", f"--out={out}"),
        *(f"--poses={recorded / 'ride.gpx'}", "--licence=CC0-1.0", "--attribution=me"),
        *("--spacing-m=2", "--neighbourhoods=1"),
    )
    city, report = City(out), json.loads((out / "import.json").read_text())
    offset_s = float(report["notes"][0].split("began ")[1].split(" s")[0])
    assert offset_s == pytest.approx(100.0, abs=0.3)  # a grid of 0.25 s
    whole_m = float(along_m(34.0))
    assert len(city) == pytest.approx(whole_m / 2, abs=3)  # though it stood for 7 s
    way_m = along_m(city.captures.time_s - BEGAN)
    truth = (ecef_from_enu(*synthetic.ANCHOR) @ pose_at(way_m))[:, :3, 3]
    place_m = city.captures.ecef_from_camera[:, :3, 3]
    # The track tells a place a second, between which speed changes.
    assert np.linalg.norm(place_m - truth, axis=1).max() < 2.5
    steps_m = np.linalg.norm(np.diff(place_m, axis=0), axis=1)
    assert np.median(steps_m) == pytest.approx(2.0, abs=0.4)
    turned = np.rad2deg(headings(city.captures.ecef_from_camera))
    np.testing.assert_allclose(turned, 45.0, atol=0.5)
    k = len(city) // 2
    shown_s = city.captures.time_s[k] - BEGAN - (offset_s - 100)  # the video's own
    far = [
        np.abs(city.panorama(k) - street_panorama(float(along_m(at_s))).astype(float))
        for at_s in (shown_s, shown_s - 1 / FPS, shown_s + 1 / FPS)
    ]
    assert far[0].mean() < 0.7 * min(far[1].mean(), far[2].mean())  # the very frame
    assert "ride/" in capsys.readouterr().out


def test_a_clock_that_cannot_be_found_must_be_given(recorded, tmp_path, monkeypatch):
    origin = recordings.Origin("CC0-1.0", "me")
    steady = tmp_path / "steady.gpx"
    seconds = np.arange(-20, 55.0)
    write_track(steady, BEGAN + seconds, 5 * seconds)
    start_s, time_s = read_times(recorded / "ride.mp4")
    assert start_s == BEGAN - 100 and len(time_s) == 340
    moved = speed_at(np.arange(0, time_s[-1], film.GRID_S))
    monkeypatch.setattr(film, "watch_motion", lambda *_: moved)
    source = film.Source(recorded, steady, origin)
    with pytest.raises(ValueError, match="too little to tell when it began"):
        film.import_film(source, film.Making("x"), tmp_path / "x")
    early = film.Source(recorded, recorded / "ride.gpx", origin, clock_s=0.0)
    with pytest.raises(ValueError, match="was taken during .*ride.gpx: the track runs"):
        film.import_film(early, film.Making("x"), tmp_path / "x")
    write_video(tmp_path / "flat.mp4", np.zeros((3, 48, 64, 3), np.uint8))
    flat = film.Source(tmp_path / "flat.mp4", steady, origin)
    with pytest.raises(ValueError, match="is 64x48: no panorama"):
        film.import_film(flat, film.Making("x"), tmp_path / "x")
    with pytest.raises(ValueError, match="holds no video"):
        film.find_films(steady)


def test_frames_are_read_from_any_time_on(recorded):
    """A resumed import decodes from there; the frames are those of a whole reading."""
    path = recorded / "ride.mp4"
    _, time_s = read_times(path)
    rows = np.array([210, 211, 300, 339])
    whole = [frame for k, frame in enumerate(read_frames(path)) if k in rows]
    np.testing.assert_array_equal(list(frames_at(path, time_s[rows])), whole)
    with pytest.raises(ValueError, match="ends before 99.00 s"):
        list(frames_at(path, np.array([33.0, 99.0])))
