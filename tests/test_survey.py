"""The survey: a city and a path looked at through the door, without weights."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax import survey
from cityrag_jax.data import inventory, masks
from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.data.pairs import PairConfig, save_pairs
from cityrag_jax.data.video import read_image, read_video, write_image
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.geo.trajectory import yaw_rotation

VIEWS = ["--height=32", "--width=64", "--spacing-m=1"]


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """Two streets that cross: 0 and 1 go north, 2 goes east."""
    drives = [
        synthetic.line([0, -40, 2], 0, 160),
        synthetic.line([1.5, -40, 2], 0, 160),
        synthetic.line([-40, 0, 2], 90, 160),
    ]
    folder = tmp_path_factory.mktemp("survey") / "city"
    city = synthetic.build(folder, drives, height=64)
    config = PairConfig(num_frames=9, min_condition=5)
    save_pairs(folder, mine_pairs(city.captures, city.name, config))
    return city


def write_path(path, corners_m):
    """Write a CSV through places given in metres east and north."""
    enu = np.array([(*c, 2.0, 1.0) for c in corners_m])
    places = enu @ ecef_from_enu(*synthetic.ANCHOR).T
    latitude, longitude, _ = geodetic_from_ecef(places[:, :3])
    rows = zip(latitude, longitude, strict=True)
    path.write_text("".join(f"{a:.9f},{b:.9f}\n" for a, b in rows))
    return path


def run(*words) -> None:
    given = survey.COMMAND.parse([str(w) for w in words])
    survey.main(given)


def test_a_turn_is_surveyed_from_the_command_line(city, tmp_path, capsys):
    path = write_path(tmp_path / "walk.csv", [(0.2, -30), (0.2, 0), (30, 0)])
    out = tmp_path / "out"
    run(f"--city={city.folder}", f"--path={path}", f"--out={out}", *VIEWS)
    said = capsys.readouterr().out
    assert "3 drives" in said and "drives 0 -> 2 (1 jumps)" in said
    facts = json.loads((out / "path.json").read_text())
    assert facts["drives"] == [0, 2] and facts["gaps_m"] == []
    assert facts["share_within"]["5_m"] == 1.0
    assert facts["views"] == facts["poses"] == pytest.approx(59, abs=3)
    assert facts["captured"] == ["2023-11-14", "2023-11-16"]
    streets = json.loads((out / "city.json").read_text())["streets"]
    # Of two streets of 80 m one was driven on two days, and they meet in the middle.
    assert streets["kilometres"] == pytest.approx(0.15, abs=0.012)
    assert streets["lacking_a_pass_km"] == pytest.approx(0.06, abs=0.005)
    lacking_km = streets["lacking_a_pass_km"]
    assert f"one more pass of {lacking_km} km would pair them all" in said
    lacking = json.loads((out / "lacking.geojson").read_text())["features"]
    assert [line["properties"]["drive"] for line in lacking] == [2, 2]
    frames, fps = read_video(out / "conditions.mp4")
    assert frames.shape == (facts["views"], 32, 64, 3) and fps == 10
    # A pixel of this city shows its direction: red is east, green is north.
    east, north = frames[-1, 14:18, 30:34, :2].mean((0, 1))
    assert east > 230 and abs(north - 127.5) < 12
    for name in ("city.png", "path.png", "contacts.jpg"):
        assert read_image(out / name).std() > 5


def test_figures_of_a_city(city):
    facts = inventory.count_city(city, None)
    assert facts["captures"] == 480 and facts["gaps"] == 0
    assert facts["spacing_m"]["median"] == 0.5
    assert facts["kilometres"] == pytest.approx(3 * 0.0795, abs=1e-3)
    # The streets that run beside each other are two thirds, and a bit of the third.
    assert facts["seen_twice_share"] == pytest.approx(2 / 3 + 0.05, abs=0.05)
    assert [d["mount_deg"] for d in facts["by_drive"]] == [0.0, 0.0, 0.0]
    assert facts["sources"] == [
        {
            "licence": "CC0-1.0",
            "attribution": "nobody",
            "anonymised": True,
            "captures": 480,
        }
    ]
    doubts = " ".join(inventory.find_doubts(facts))
    assert "one neighbourhood" in doubts and "not anonymised" not in doubts


def test_a_camera_mounted_sideways_is_said(city):
    poses = city.captures.ecef_from_camera[:160] @ yaw_rotation(np.array(np.pi / 2))
    assert inventory.mount_offset(poses) == 90.0
    assert inventory.mount_offset(poses[:1]) is None
    facts = inventory.count_city(city, None)
    facts["by_drive"][1]["mount_deg"] = 90.0
    assert "drive 1): was the camera mounted so" in inventory.find_doubts(facts)[0]


def test_captures_that_show_people_are_said(city, tmp_path, capsys):
    columns = city.captures
    plain = dataclasses.replace(columns, anonymised=columns.drive != 1)
    city.captures = plain
    try:
        path = write_path(tmp_path / "walk.csv", [(1.5, -30), (1.5, 30)])
        poses = survey.read_path(path, city, 1.0)
        config = survey.ClipConfig(height=32, width=64)
        facts = survey.survey_path(city, poses, config, tmp_path)
        assert facts["not_anonymised"] > 50 and facts["masked"] == 0
        said = survey.describe_path(facts)
        assert "captures shown are not anonymised: in " in said
        # Of one capture the mask is there: a post straight ahead.
        match = survey.match_path(city.index, poses, survey.Costs())
        views = survey.ground_path(city.index, poses, match)
        frames = survey.show_views(city, views, config)
        mask = np.zeros((90, 180, 3), np.uint8)
        mask[:, 85:95] = 255
        path = masks.mask_path(city, int(views.captures[3]))
        path.parent.mkdir()
        write_image(path, mask)
        covered, shown = survey.cover_people(city, views, frames, config)
        assert shown == (facts["not_anonymised"], 1)
        assert "1 are masked, in" in shown.describe()
        differs = np.any(covered != frames, axis=-1)
        assert differs[3, :, 27:37].mean() > 0.5 and not differs[3, :, :22].any()
        assert not differs[np.arange(len(frames)) != 3].any()
    finally:
        city.captures = columns
        shutil.rmtree(city.folder / "masks", ignore_errors=True)


def test_a_path_elsewhere_is_refused_with_its_distance(city, tmp_path):
    path = write_path(tmp_path / "walk.csv", [(100, 30), (100, 90)])
    with pytest.raises(ValueError, match="no capture within 15.0 m of the path"):
        run(f"--city={city.folder}", f"--path={path}", f"--out={tmp_path}", *VIEWS)


class FakeRerun:
    """The part of rerun that is used (0.41's names), noting what is logged."""

    class ViewCoordinates:
        RIGHT_HAND_Z_UP, RDF = "z up", "rdf"

    def __init__(self):
        self.logged, self.times = [], []

    def __getattr__(self, name):
        return lambda *given, **kinds: (name, given, kinds)

    def RecordingStream(self, name):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def save(self, path):
        path.write_bytes(b"rrd")

    def set_time(self, timeline, sequence):
        self.times.append(sequence)

    def log(self, entity, content, static=False):
        self.logged.append((entity, content))


def test_a_path_is_written_for_rerun(city, tmp_path, monkeypatch):
    """Each view's camera stands at its capture and looks as the path does there."""
    path = write_path(tmp_path / "walk.csv", [(0.2, -30), (0.2, 0), (30, 0)])
    words = [f"--city={city.folder}", f"--path={path}", "--rerun", *VIEWS]
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ValueError, match="--rerun needs the rerun-sdk: pip install"):
        run(*words, f"--out={tmp_path / 'a'}")
    fake = FakeRerun()
    monkeypatch.setitem(sys.modules, "rerun", fake)
    run(*words, f"--out={tmp_path / 'b'}")
    assert (tmp_path / "b" / "path.rrd").read_bytes() == b"rrd"
    logged = dict(fake.logged)
    (drives,) = logged["world/drives"][1]
    assert [len(line) for line in drives] == [160, 160, 160]
    np.testing.assert_allclose(drives[0][0], [0, -40, 2], atol=1e-6)
    poses = [c[2] for e, c in fake.logged if e == "world/view" and "mat3x3" in c[2]]
    first, last = poses[0], poses[-1]
    np.testing.assert_allclose(first["translation"], [0, -30, 2], atol=0.3)
    np.testing.assert_allclose(first["mat3x3"][:, 2], [0, 1, 0], atol=1e-4)
    np.testing.assert_allclose(last["mat3x3"][:, 2], [1, 0, 0], atol=1e-4)
    assert fake.times == sorted(fake.times) and len(fake.times) == len(poses)
