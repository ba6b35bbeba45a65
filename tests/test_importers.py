"""A folder of panoramas becomes a city: what was painted and tagged comes back."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import synthetic_city as synthetic
import tagged_pictures as tagged

from cityrag_jax import survey
from cityrag_jax.data import shards
from cityrag_jax.data.masks import hide
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.geo.levelling import fit_panorama
from cityrag_jax.geo.matching import match_path
from cityrag_jax.geo.neighbourhoods import cluster_places
from cityrag_jax.geo.poses import level_from_tilted
from cityrag_jax.geo.trajectory import headings
from cityrag_jax.importers import cities, folder, recordings

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "build_city.py"
MORNING, EVENING = 1.7e9, 1.7e9 + 40_000.0
NOBODY, MAKING = recordings.Origin("CC0-1.0", "nobody"), cities.Making("x")
WHOSE = ("--licence=CC-BY-4.0", "--attribution=those who drove")
SHORT = (*WHOSE, "--num-frames=9", "--neighbourhoods=1")
DRIVES = [
    synthetic.line([0, -20, 2], 0, 24, spacing=1.0),
    synthetic.line([1.5, -20, 2], 0, 24, spacing=1.0),
]


def load_tool():
    spec = importlib.util.spec_from_file_location("build_city", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(*words) -> None:
    tool = load_tool()
    tool.main(tool.COMMAND.parse([str(word) for word in words]))


def tilted(enu_from_camera, yaw_deg=0.0, pitch_deg=0.0, roll_deg=0.0):
    """Turn a camera on its mount to the right, then up, then its right side down."""
    pose = enu_from_camera.copy()
    turn = level_from_tilted(np.deg2rad(pitch_deg), np.deg2rad(roll_deg))
    yaw = np.deg2rad(yaw_deg)
    about_down = np.array(
        [[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]]
    )
    pose[:3, :3] = pose[:3, :3] @ about_down @ turn
    return pose


def place_of(enu_from_camera):
    ecef = ecef_from_enu(*synthetic.ANCHOR) @ enu_from_camera
    return [float(x) for x in geodetic_from_ecef(ecef[:3, 3])]


def photograph(path, drive, time_s, *, yaw_deg=0.0, pitch_deg=0.0, roll_deg=0.0):
    """Write a drive's pictures as a camera with GPano tags does, one a second."""
    for k, pose in enumerate(drive):
        latitude, longitude, height_m = place_of(pose)
        heading = np.rad2deg(np.arctan2(pose[0, 2], pose[1, 2])) + yaw_deg
        tags = {"ProjectionType": "equirectangular", "PoseRollDegrees": roll_deg}
        tags |= {"PosePitchDegrees": pitch_deg, "PoseHeadingDegrees": heading % 360}
        turned = tilted(pose, yaw_deg, pitch_deg, roll_deg)
        tagged.save(
            path / f"IMG_{k:04d}.JPG",
            synthetic.direction_panorama(turned, 64),
            xmp=tagged.gpano(**tags),
            place=(latitude, longitude),
            height_m=height_m,
            time_s=time_s + k,
        )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two drives of a street; the second camera is turned, and tilted, on its mount."""
    path = tmp_path_factory.mktemp("recording")
    photograph(path / "morning", DRIVES[0], MORNING)
    photograph(
        path / "evening", DRIVES[1], EVENING, yaw_deg=90, pitch_deg=6, roll_deg=-4
    )
    (path / "morning" / "notes.txt").write_text("sunny")
    (path / "morning" / "IMG_9999.HEIC").write_bytes(b"....ftypheic")
    (path / "morning" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    tagged.save(path / "dinner.jpg", np.zeros((30, 40, 3), np.uint8))
    return path


@pytest.fixture(scope="module")
def city(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "munich"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 10)
        build("--source=folder", f"--from={photos}", f"--out={out}", *SHORT)
    return City(out)


def test_places_times_and_headings_come_back(city):
    truth = np.concatenate([DRIVES[1], DRIVES[0]])  # folders in order of their names
    expected = ecef_from_enu(*synthetic.ANCHOR) @ truth
    apart_m = np.linalg.norm(
        (city.captures.ecef_from_camera - expected)[:, :3, 3], axis=1
    )
    assert apart_m.max() < 0.01
    turned = np.rad2deg(headings(city.captures.ecef_from_camera))
    np.testing.assert_allclose(turned, np.repeat([90.0, 0.0], 24), atol=1e-4)
    seconds = np.concatenate([EVENING + np.arange(24), MORNING + np.arange(24)])
    np.testing.assert_allclose(city.captures.time_s, seconds, atol=1e-3)
    assert city.header.licences == ("CC-BY-4.0",) and not city.captures.anonymised.any()
    assert city.header.panorama_height == 64 and city.name == "munich"


def test_what_a_crop_shows_is_where_it_looks(city):
    """Panoramas of a tilted camera are level: a pixel's colour is its direction."""
    captures = np.array([3, 40])
    for yaw_deg in (0.0, -90.0):
        crops = city.crops(
            captures, np.full(2, np.deg2rad(yaw_deg)), height=33, width=33, fov_deg=65.0
        )
        centre = crops[:, 15:18, 15:18].mean((1, 2))
        heading = np.deg2rad(np.array([90.0, 0.0]) + yaw_deg)
        wanted = 127.5 + 120 * np.stack(
            [np.sin(heading), np.cos(heading), 0 * heading], 1
        )
        assert np.abs(centre - wanted).max() < 3


def test_the_report_tells_mounts_and_what_was_skipped(city, capsys):
    report = json.loads((city.folder / "import.json").read_text())
    evening, morning = report["by_drive"]
    assert (evening["folder"], evening["mount_deg"]) == ("evening", 90.0)
    assert morning["mount_deg"] == 0.0 and morning["spacing_m"] == 1.0
    assert morning["captures"] == 24 and evening["mount_spread_deg"] == 0.0
    skipped = {names[0]: reason for reason, names in report["skipped"].items()}
    assert "convert them to JPEG" in skipped["morning/IMG_9999.HEIC"]
    assert "not a readable picture" in skipped["morning/broken.jpg"]
    assert "no panorama, which is twice as wide as high" in skipped["dinner.jpg"]
    said = cities.describe_import(report)
    assert "camera 90 degrees right of the course" in said
    assert "skipped 1, HEIC" in said


def test_pairs_are_mined_and_a_path_is_found(city, tmp_path):
    assert (city.folder / "pairs.parquet").exists()
    facts = survey.survey_city(city, tmp_path)
    assert facts["pairs"] > 0 and facts["drives"] == 2
    walk = ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line([0.4, -15, 2], 0, 12, 1.0)
    match = match_path(city.index, walk)
    assert np.nanmax(match.distance_m) < 0.6 and match.gaps() == []


def test_a_stopped_import_goes_on(photos, city, tmp_path, monkeypatch):
    """As a kill leaves it; the pictures of whole files are not decoded again."""
    monkeypatch.setattr(shards, "SHARD", 16)
    read, left = folder.read_image, iter(range(40))

    def stops(path):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(path)

    words = ["--source=folder", f"--from={photos}", f"--out={tmp_path / 'munich'}"]
    words += SHORT
    monkeypatch.setattr(folder, "read_image", stops)
    with pytest.raises(KeyboardInterrupt):
        build(*words)
    assert os.listdir(tmp_path) == [".munich.writing"]
    again = []
    monkeypatch.setattr(
        folder, "read_image", lambda path: again.append(path) or read(path)
    )
    build(*words)
    assert len(again) in (16, 32)  # of 48: what was in flight is lost
    made = City(tmp_path / "munich")
    assert made.captures.time_s.tolist() == city.captures.time_s.tolist()
    np.testing.assert_array_equal(made.panorama(20), city.panorama(20))


PROGRAM = """
import runpy, sys
from cityrag_jax.data import shards
if __name__ == "__main__":  # not again in its processes
    shards.SHARD = 10
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_processes_side_by_side_are_killed_and_write_the_same_bytes(
    photos, city, tmp_path, monkeypatch
):
    """With whoever started them they end, too; what was made is not made again."""
    program, shared = tmp_path / "program.py", tmp_path / "munich"
    program.write_text(PROGRAM)
    words = ["--source=folder", f"--from={photos}", f"--out={shared}", *SHORT]
    command = [sys.executable, program, TOOL, *words, "--workers=2"]
    started = subprocess.Popen(list(map(str, command)), cwd=TOOL.parents[1])
    writing = tmp_path / ".munich.writing"
    deadline = time.monotonic() + 60
    while not (notes := list(writing.glob("panoramas/*/*0*.json"))):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = pathlib.Path(f"/proc/{started.pid}/task/{started.pid}/children")
    workers = children.read_text().split()
    assert len(workers) >= 2
    started.kill()
    started.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in notes}
    monkeypatch.setattr(shards, "SHARD", 10)
    kept, forget = [], shards.Job.forget

    def look(job):
        kept.extend(p.stat().st_mtime_ns == before[p] for p in before)
        forget(job)

    monkeypatch.setattr(shards.Job, "forget", look)
    build(*words, "--workers=2")
    assert kept and all(kept)
    same_files(city.folder, shared, files=5)


def same_files(left, right, files, but=""):
    """Hold two cities' files equal, `files` of them of tiles, `but` those of a kind."""
    written = [p.relative_to(left) for p in sorted(left.rglob("*")) if p.is_file()]
    written = [path for path in written if path.suffix != but]
    for name in ("horizon", "panoramas"):
        assert sum(f"{name}-train" in path.name for path in written) == files
    for path in written:
        assert (right / path).read_bytes() == (left / path).read_bytes(), path
    assert len(list(right.rglob("*"))) == len(list(left.rglob("*")))


def test_a_picture_that_turns_out_damaged_is_left_out(tmp_path):
    photograph(tmp_path / "in", DRIVES[0][:6], MORNING)
    path = tmp_path / "in" / "IMG_0002.JPG"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\xff\xda")])  # the head alone
    source = folder.Source(tmp_path / "in", NOBODY)
    city, report = folder.import_folder(source, MAKING, tmp_path / "out")
    assert len(city) == report["pictures"] == 5
    assert report["skipped"] == {"1 not decoded": ["IMG_0002.JPG"]}


def test_a_track_places_pictures_without_gps(tmp_path):
    """A camera whose clock is 3 s slow, at 2 m/s, and a GPX from another device."""
    points = []
    for k, pose in enumerate(synthetic.line([0, 0, 2], 45, 20, spacing=4.0)):
        latitude, longitude, height_m = place_of(pose)
        points.append(
            f'<trkpt lat="{latitude:.9f}" lon="{longitude:.9f}"><ele>{height_m}</ele>'
            f"<time>2023-11-14T22:13:{20 + 2 * k:02d}Z</time></trkpt>"
        )
    track = tmp_path / "walk.gpx"
    track.write_text(f"<gpx><trk><trkseg>{''.join(points)}</trkseg></trk></gpx>")
    for k in range(12):
        grey = np.full((64, 128, 3), 90, np.uint8)
        tagged.save(tmp_path / "in" / f"{k:02d}.png", grey, time_s=MORNING - 3 + k)
    source = folder.Source(tmp_path / "in", NOBODY, poses=track, clock_s=3.0)
    city, report = folder.import_folder(source, MAKING, tmp_path / "out")
    truth = ecef_from_enu(*synthetic.ANCHOR) @ synthetic.line([0, 0, 2], 45, 12, 2.0)
    got = city.captures.ecef_from_camera
    assert np.linalg.norm((got - truth)[:, :3, 3], axis=1).max() < 0.01
    np.testing.assert_allclose(np.rad2deg(headings(got)), 45.0, atol=0.1)
    assert report["by_drive"][0]["mount_deg"] is None


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_pose_file_names_its_pictures(tmp_path, kind):
    rows = []
    for k, pose in enumerate(DRIVES[0][:5]):
        tagged.save(tmp_path / "in" / f"{k}.jpg", np.full((64, 128, 3), 90, np.uint8))
        latitude, longitude, height_m = place_of(pose)
        rows.append(
            {
                "filename": f"/home/me/in/{k}.jpg",
                "filetype": "image",
                "MAPLatitude": latitude,
                "MAPLongitude": longitude,
                "MAPAltitude": height_m,
                "MAPCaptureTime": f"2023_11_14_22_13_{20 + k}_500",
                "MAPCompassHeading": {"TrueHeading": 10.0, "MagneticHeading": 7.0},
            }
        )
    poses = tmp_path / f"poses.{kind}"
    if kind == "json":
        poses.write_text(json.dumps([*rows, {"filename": "a", "error": {}}]))
    else:
        lines = ["file;lat;lng;heading;time;ele"]
        for k, row in enumerate(rows):
            place = f"{row['MAPLatitude']};{row['MAPLongitude']};10,0"
            lines.append(f"{k}.jpg;{place};2023-11-14T22:13:{20 + k}.5Z;522")
        poses.write_text("\n".join(lines))
    source = folder.Source(tmp_path / "in", NOBODY, poses=poses)
    city, report = folder.import_folder(source, MAKING, tmp_path / "out")
    assert city.captures.time_s.tolist() == [MORNING + 0.5 + k for k in range(5)]
    assert not any("time zone" in note for note in report["notes"])  # of the pictures
    turned = np.rad2deg(headings(city.captures.ecef_from_camera))
    np.testing.assert_allclose(turned, 10.0, atol=1e-6)


def shots(place_m, time_s, heading=np.nan, names=None):
    """Make shots of places in metres east and north."""
    count = len(place_m)
    enu = np.tile(np.eye(4), (count, 1, 1))
    enu[:, :2, 3] = place_m
    ecef = ecef_from_enu(*synthetic.ANCHOR) @ enu
    latitude, longitude, height_m = geodetic_from_ecef(ecef[:, :3, 3])
    names = names or tuple(f"{k:04d}.jpg" for k in range(count))
    headings_deg = np.broadcast_to(np.asarray(heading, float), count).copy()
    level, seconds = np.zeros(count), np.asarray(time_s, float)
    pose = (latitude, longitude, height_m, headings_deg, level, level)
    return recordings.Shots(names, seconds, *pose, (NOBODY,) * count)


def test_drives_end_at_gaps_of_time_and_place_and_at_folders():
    north = np.stack([np.zeros(40), np.arange(40.0)], -1)
    north[30:] += 100
    seconds = 1.7e9 + np.arange(40.0)
    seconds[10:] += 1000
    names = tuple(f"{'a' if k < 20 else 'b'}/{k:02d}.jpg" for k in range(40))
    captures, chosen, report = recordings.make_captures(
        shots(north, seconds, names=names), recordings.Cuts()
    )
    assert [d["captures"] for d in report["by_drive"]] == [10, 10, 10, 10]
    assert chosen.tolist() == list(range(40))
    assert captures.drive.tolist() == np.repeat(range(4), 10).tolist()


def test_spacing_thins_dense_drives_and_refuses_sparse_ones():
    line = np.stack([np.zeros(60), 0.25 * np.arange(60)], -1)
    given = shots(line, 1.7e9 + np.arange(60))
    captures, chosen, report = recordings.make_captures(
        given, recordings.Cuts(spacing_m=1.0)
    )
    assert chosen.tolist() == list(range(0, 60, 4)) and len(captures) == 15
    assert len(report["skipped"]["nearer than 1 m to the one before"]) == 45
    sparse, cuts = (
        shots(20 * line, 1.7e9 + np.arange(60)),
        recordings.Cuts(spacing_m=1.0),
    )
    with pytest.raises(ValueError, match="5 m apart, wider than the 1 m wanted"):
        recordings.make_captures(sparse, cuts)


def test_headings_by_course_keep_the_mount_that_noisy_ones_agree_on(rng):
    """Compasses err by 15 degrees; their middle over a drive does by three."""
    line = np.stack([np.arange(50.0), np.zeros(50)], -1)
    noisy = 90 - 40 + rng.normal(0, 15, 50)
    given = shots(line, 1.7e9 + np.arange(50), noisy)
    cuts = recordings.Cuts(headings="course")
    captures, _, report = recordings.make_captures(given, cuts)
    assert report["by_drive"][0]["mount_deg"] == pytest.approx(-40, abs=6)
    turned = np.rad2deg(headings(captures.ecef_from_camera))
    np.testing.assert_allclose(turned, 50.0, atol=6)
    assert np.ptp(turned) < 1e-3
    cuts = recordings.Cuts(headings="course", mount_deg=180.0)
    captures, _, _ = recordings.make_captures(given, cuts)
    np.testing.assert_allclose(
        np.rad2deg(headings(captures.ecef_from_camera)), -90.0, atol=1e-3
    )


def test_a_picture_alone_needs_a_heading():
    with pytest.raises(ValueError, match="None of 1 pictures can be given a heading"):
        recordings.make_captures(shots([(0, 0)], [1.7e9]), recordings.Cuts())
    captures, _, _ = recordings.make_captures(
        shots([(0, 0)], [1.7e9], 20.0), recordings.Cuts()
    )
    assert len(captures) == 1


def test_a_levelled_panorama_equals_one_taken_level():
    level = synthetic.line([0, 0, 2], 30, 1)[0]
    truth = synthetic.direction_panorama(level, 96).astype(int)
    for pitch, roll in ((8.0, 0.0), (0.0, -12.0), (5.0, 7.0)):
        taken = synthetic.direction_panorama(tilted(level, 0, pitch, roll), 96)
        angles = {"pitch_rad": np.deg2rad(pitch), "roll_rad": np.deg2rad(roll)}
        mended = fit_panorama(taken, 96, **angles).astype(int)
        # Colours are smooth but at the poles, where a pixel is wide.
        assert np.abs(mended - truth)[4:-4].max() <= 2
        assert np.abs(taken.astype(int) - truth).max() > 10


def test_a_picture_without_poles_is_put_in_its_place():
    level = synthetic.line([0, 0, 2], 30, 1)[0]
    truth = synthetic.direction_panorama(level, 96)
    whole = fit_panorama(truth[12:72], 96, above=12 / 96, below=24 / 96)
    np.testing.assert_array_equal(whole[12:72], truth[12:72])
    np.testing.assert_array_equal(whole[:12], np.repeat(truth[12:13], 12, 0))


def test_pictures_that_show_too_little_are_named(tmp_path):
    area = {"FullPanoWidthPixels": 400, "FullPanoHeightPixels": 200}
    area |= {"CroppedAreaLeftPixels": 0, "CroppedAreaTopPixels": 80}
    picture = np.zeros((40, 400, 3), np.uint8)
    for name, width in (("low", 400), ("half", 200)):
        told = area | {"CroppedAreaImageWidthPixels": width}
        xmp = tagged.gpano(**told, CroppedAreaImageHeightPixels=40)
        tagged.save(tmp_path / f"{name}.jpg", picture[:, :width], xmp=xmp)
    cube = tagged.gpano(ProjectionType="cubemap")
    tagged.save(tmp_path / "cube.jpg", np.zeros((20, 40, 3), np.uint8), xmp=cube)
    with pytest.raises(ValueError, match="holds no panoramas") as refused:
        folder.find_pictures(tmp_path, folder.collections.defaultdict(list))
    said = str(refused.value)
    assert "is cubemap, not equirectangular" in said
    assert "shows 180 of 360 degrees around" in said
    assert "shows 18 degrees above and -18 below" not in said and "18 degrees" in said


def test_whose_pictures_they_are_must_be_said(tmp_path):
    words = ["--source=folder", f"--from={tmp_path}", f"--out={tmp_path / 'x'}"]
    with pytest.raises(ValueError, match="--workers=0: give 1 or more"):
        build(*words, "--workers=0")
    with pytest.raises(ValueError, match="needs --licence"):
        build(*words)


def test_streets_of_equal_length_become_neighbourhoods():
    """Four streets of a kilometre far apart; one was driven a hundred times."""
    along = np.arange(0, 1000, 5.0)
    places, street = [], []
    for k in range(4):
        for _ in range(100 if k == 0 else 1):
            places.append(np.stack([along, np.full(200, 5000.0 * k), 0 * along], -1))
            street.append(np.full(200, k))
    numbers = cluster_places(np.concatenate(places))
    street = np.concatenate(street)
    assert len(set(zip(numbers.tolist(), street.tolist(), strict=True))) == 4
    assert numbers.max() == 3
    with pytest.raises(ValueError, match="9 neighbourhoods of 1 places"):
        cluster_places(np.zeros((5, 3)), 9)


def test_districts_of_a_file_are_the_neighbourhoods(photos, tmp_path, capsys):
    """Given while importing, or later; the southern half, less a hole, is held out."""

    def square(west, south, east, north):
        corners = [(west, south), (east, south), (east, north), (west, north)]
        enu = [ecef_from_enu(*synthetic.ANCHOR) @ (*c, 0.0, 1.0) for c in corners]
        latitude, longitude, _ = geodetic_from_ecef(np.array(enu)[:, :3])
        return np.stack([longitude, latitude], -1).tolist()

    path, out = tmp_path / "parts.geojson", tmp_path / "munich"
    south = {"type": "Polygon", "coordinates": [square(-9, -99, 9, -9.5)]}
    north = [[square(-9, -9.5, 9, 99)], [square(90, 0, 99, 9)]]
    shapes = [south, {"type": "MultiPolygon", "coordinates": north}]
    features = [{"type": "Feature", "geometry": shape} for shape in shapes]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    words = ["--source=folder", f"--from={photos}", f"--out={out}", *WHOSE]
    limits = ["--num-frames=5", "--min-condition=3", "--buffer-m=1", "--held-out=0"]
    build(*words, *limits, f"--districts={path}")
    city, pairs = City(out), load_pairs(out)
    north_m = (
        np.linalg.inv(ecef_from_enu(*synthetic.ANCHOR)) @ city.captures.ecef_from_camera
    )[:, 1, 3]
    np.testing.assert_array_equal(city.captures.neighbourhood, north_m > -9.5)
    held = city.captures.neighbourhood[pairs.evaluation.start_a]
    assert len(held) and not held.any() and len(pairs.training)
    assert "2 neighbourhoods" in capsys.readouterr().out
    south["coordinates"].append(square(-9, -15.5, 9, -12.5))
    path.write_text(json.dumps(south))
    build(f"--mine={out}", *limits[:3], "--held-out-fraction=0", f"--districts={path}")
    inside = (north_m < -9.5) & ((north_m < -15.5) | (north_m > -12.5))
    np.testing.assert_array_equal(City(out).captures.neighbourhood, ~inside)
    path.write_text(json.dumps(square(0, 0, 1, 1)))
    with pytest.raises(ValueError, match="parts.geojson is no GeoJSON object"):
        build(f"--mine={out}", f"--districts={path}")
    far = {"type": "Polygon", "coordinates": [[[48, 11], [49, 11], [49, 12]]]}
    path.write_text(json.dumps(far))
    with pytest.raises(ValueError, match=r"around \[11.575.*puts longitude first"):
        build(f"--mine={out}", f"--districts={path}")


def test_masked_parts_are_blurred_before_they_are_written(tmp_path):
    """What has a mask counts as anonymised, and how many have none is told."""
    photograph(tmp_path / "in", DRIVES[0][:3], MORNING)
    masks = tmp_path / "masks"
    with pytest.raises(ValueError, match="is no folder of masks"):
        cities.find_masks(masks, ("a.jpg",))
    mask = np.zeros((32, 64), np.uint8)
    mask[12:16, 10:14] = 255
    tagged.save(masks / "IMG_0001.png", mask)
    with pytest.raises(ValueError, match="no mask for any of 1 pictures"):
        cities.find_masks(masks, ("other.jpg",))
    source, making = folder.Source(tmp_path / "in", NOBODY), cities.Making("x")
    plain, _ = folder.import_folder(source, making, tmp_path / "plain")
    making = cities.Making("x", masks=masks)
    city, report = folder.import_folder(source, making, tmp_path / "blurred")
    assert city.captures.anonymised.tolist() == [False, True, False]
    assert "2 of 3 pictures have no mask in masks/: not blurred" in report["notes"]
    shown, before = city.panorama(1), plain.panorama(1)
    assert np.any(shown[24:32, 20:28] != before[24:32, 20:28])
    np.testing.assert_array_equal(shown[:, 64:], before[:, 64:])
    np.testing.assert_array_equal(city.panorama(0), plain.panorama(0))
    noise = np.random.default_rng(0).integers(0, 256, (320, 640, 3), np.uint8)
    hidden = hide(noise, mask > 0)
    blocks = np.unique(hidden[120:160, 104:136].reshape(-1, 3), axis=0)
    assert len(blocks) == 5 * 4 and blocks.std() < 20  # of 8 x 8 pixels each
    np.testing.assert_array_equal(hidden[:115], noise[:115])
