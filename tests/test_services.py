"""Panoramax and Mapillary become cities, whatever the network does meanwhile."""

import importlib.util
import itertools
import json
import pathlib
import threading

import numpy as np
import picture_server as served
import pytest
import synthetic_city as synthetic
from test_importers import EVENING, MORNING, tilted

from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.trajectory import headings
from cityrag_jax.importers import listing, mapillary, panoramax, web

TOOLS = pathlib.Path(__file__).parents[1] / "tools"
DRIVES = [synthetic.line([x, -20, 2], 0, 12, spacing=1.0) for x in (0, 1.5)]
BOX = "11.574,48.136,11.576,48.138"


class Clock:
    """Time that passes when somebody sleeps, and is not waited for."""

    def __init__(self):
        self.now, self.slept, self._lock = 0.0, [], threading.Lock()

    def sleep(self, seconds):
        with self._lock:
            self.now += seconds
            self.slept.append(seconds)

    def client(self, **kinds):
        kinds = {"timeout_s": (2.0, 0.2), "per_s": 1000.0} | kinds
        return web.Client(sleep=self.sleep, clock=lambda: self.now, **kinds)


@pytest.fixture
def service():
    with served.Service().running() as running:
        yield running


@pytest.fixture
def clock():
    return Clock()


def call(clock, name, *words):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.Client = clock.client
    tool.main(tool.COMMAND.parse([*map(str, words)]))


def build(clock, *words):
    call(clock, "build_city", *words, "--num-frames=9")


def publish_panoramax(service):
    """Put two drives into a federation: the pictures lie on another host."""
    items, host = [], f"http://localhost:{service.port}"
    for drive, (poses, time_s) in enumerate(
        zip(DRIVES, (MORNING, EVENING), strict=True)
    ):
        for k, pose in enumerate(poses):
            name, tilt = f"d{drive}-{k:02d}", (6.0, -4.0) if drive else (0.0, 0.0)
            service.pictures[f"/{name}.jpg"] = served.jpeg(tilted(pose, 0.0, *tilt))
            facts = {"pers:pitch": tilt[0], "pers:roll": tilt[1]}
            facts["license"] = "CC-BY-SA-4.0" if drive else "etalab-2.0"
            place = (name, f"seq-{drive}", pose, time_s + k, f"{host}/{name}.jpg")
            items.append(served.stac_item(*place, **facts))
    pose, flat = DRIVES[0][3], {"field_of_view": 70}
    odd = {
        "flat": {"pers:interior_orientation": flat},
        "free": {"license": None},
        "own": {"license": "proprietary"},
        "gone": {},
    }
    for name, facts in odd.items():
        url = f"{host}/{name}.jpg"
        items.append(served.stac_item(name, "odd", pose, MORNING, url, **facts))

    def answer(path, query, _):
        if path != "/api/search":
            return 404, {"message": "Not Found"}
        found = served.search(
            items, lambda x: x["geometry"]["coordinates"], query["bbox"], query["limit"]
        )
        return 200, {"type": "FeatureCollection", "features": found, "links": []}

    service.answer = answer
    return items


def test_panoramax_becomes_a_city_through_every_fault(
    service, clock, tmp_path, capsys, monkeypatch
):
    """Nothing is fetched twice, what cannot be had is told, the rest is right."""
    items = publish_panoramax(service)
    monkeypatch.setattr(panoramax, "PAGE", 20)  # of 28: asked in four again
    service.faults = {
        "/api/search": [(429, "7"), 500, "garbage", "hang"],
        "/d0-03.jpg": [503, "short", "cut", 500],
        "/d1-05.jpg": ["hang"],
        "/d1-06.jpg": [(503, "Wed, 21 Oct 2015 07:28:00 GMT")],
    }
    out, listed = tmp_path / "munich", tmp_path / "munich.panoramax"
    where = (f"--bbox={BOX}", f"--api=http://127.0.0.1:{service.port}/api")
    call(clock, "find_pairs", "--source=panoramax", *where, f"--out={listed}")
    said = capsys.readouterr().out
    assert "25 panoramas in 3 sequences, 2023-11-14 to 2023-11-15" in said
    # Two drives of 11 m along one street: 11 m of street, at two times.
    assert "0.011 km of streets, 0.011 km of them at two times" in said
    lines = json.loads((listed / "streets.geojson").read_text())["features"]
    assert [line["properties"] for line in lines] == [{"times": 2}] * 2
    assert not any(path.endswith(".jpg") for path, _, _ in service.asked)
    searched = service.count("/api/search")
    words = ("--source=panoramax", *where, f"--out={out}", "--neighbourhoods=1")
    build(clock, *words)
    assert service.count("/api/search") == searched  # the listing is there already
    city = City(out)
    assert len(city) == 24 and city.header.panorama_height == 64
    assert city.header.licences == ("CC-BY-SA-4.0", "etalab-2.0")
    assert city.header.attributions == ("a driver via Panoramax (localhost)",)
    licence = np.array(city.header.licences)[city.captures.licence]
    assert np.all((licence == "etalab-2.0") == (city.captures.time_s < EVENING))
    truth = ecef_from_enu(*synthetic.ANCHOR) @ np.concatenate(DRIVES)
    apart_m = np.linalg.norm((city.captures.ecef_from_camera - truth)[:, :3, 3], axis=1)
    assert apart_m.max() < 0.01
    np.testing.assert_allclose(headings(city.captures.ecef_from_camera), 0, atol=1e-6)
    level = synthetic.direction_panorama(DRIVES[0][0], 64).astype(int)
    assert np.abs(city.panorama(20) - level)[4:-4].max() < 12  # levelled, and a JPEG
    report = json.loads((out / "import.json").read_text())
    reasons = {names[0]: why for why, names in report["skipped"].items()}
    assert reasons["flat"] == "not a panorama of 360 degrees"
    assert report["skipped"][reasons["free"]] == ["free", "own"]
    assert "no licence (--licence=SPDX" in reasons["free"]
    assert reasons["gone"] == "picture refused with status 404"
    assert "skipped 2, no licence" in capsys.readouterr().out
    assert any(6.9 < slept < 7.1 for slept in clock.slept)  # what Retry-After said
    assert service.count("/d0-03.jpg") == 5 and service.count("/d0-04.jpg") == 1

    before = len(service.asked)
    build(clock, *words, "--overwrite")
    asked = [path for path, _, _ in service.asked[before:]]
    assert asked == ["/gone.jpg"]  # all else lies there
    assert len(City(out)) == 24 < len(items)
    with pytest.raises(ValueError, match=r"lists something else \(bbox was"):
        other = [w.replace(BOX, "11.5,48,11.51,48.01") for w in words]
        build(clock, *other, "--overwrite", f"--from={out}.panoramax")


def test_a_listing_goes_on_where_it_was_cut(tmp_path):
    """As a kill leaves it: half a line at the end."""
    asked = []

    def list_area(area, skipped):
        asked.append(area)
        skipped["flat"].append(f"f{area}")
        kinds = {"time_s": 1.0, "latitude_deg": 2.0, "longitude_deg": float(area)}
        whose = ("url", "link", "CC0-1.0", "me", True)
        return [
            listing.Item(name, "s", *whose, **kinds) for name in ("twice", f"i{area}")
        ]

    service = listing.Service({"service": "test"}, [1, 2, 3], list_area, lambda _: None)
    items, skipped = listing.list_items(service, tmp_path)
    assert [item.id for item in items] == ["i1", "i2", "i3", "twice"]
    assert skipped == {"flat": ["f1", "f2", "f3"]} and np.isnan(items[0].heading_deg)
    path = tmp_path / "listing.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:30])
    asked.clear()
    again, _ = listing.list_items(service, tmp_path)
    assert sorted(asked) == [2, 3] and repr(again) == repr(items)
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="listing.jsonl is damaged"):
        listing.list_items(service, tmp_path)


def test_a_service_that_is_down_is_given_up_with_the_reason(service, clock, tmp_path):
    url = f"http://127.0.0.1:{service.port}/x"
    service.faults = {"/x": [500, 502, "hang", 500, 500, 500]}
    with pytest.raises(web.Unreachable, match="/x: no answer in 6 tries .status 500"):
        clock.client().read_json(url, token="secret")
    assert sum(clock.slept) > 31  # 1 + 2 + 4 + 8 + 16
    service.faults = {"/x": [(429, "3600")]}
    with pytest.raises(web.Unreachable, match="left alone for 60 minutes"):
        clock.client().read_json(url)
    with pytest.raises(web.Refused, match="/x: status 404 .*nothing here") as refused:
        clock.client().read_json(url, token="secret")
    assert "secret" not in str(refused.value)
    service.answer = lambda *_: (200, {})
    clock.slept.clear()
    client = clock.client(per_s=4.0)
    for _ in range(5):
        client.read_json(url)
    assert sum(clock.slept) == pytest.approx(1.0)  # five requests, four spaces


def publish_mapillary(service):
    """Put two drives there whose groups were computed 3 and 2 m off, by a token."""
    images, host = [], f"http://localhost:{service.port}"
    for drive, poses in enumerate(DRIVES):
        shift_m = ((3.0, 0.0), (0.0, -2.0))[drive]
        for k, pose in enumerate(poses):
            name = f"{drive}{k:03d}"
            turned = tilted(pose, 90.0 * drive, 5.0 * drive, -3.0 * drive)
            service.pictures[f"/{name}.jpg"] = served.jpeg(turned)
            image = served.mapillary_image(
                *(name, f"seq{drive}", turned, (MORNING, EVENING)[drive] + k),
                *(f"{host}/{name}.jpg", 100 + drive, shift_m),
            )
            images.append(image)
    images[7]["thumb_original_url"] = f"{host}/expired.jpg"
    images.append(images[3] | {"id": "phone", "is_pano": False})

    def answer(path, query, headers):
        if headers.get("Authorization") != f"OAuth {served.TOKEN}":
            return 401, {"error": {"type": "OAuthException", "code": 190}}
        wanted = query["fields"].split(",")
        if path == "/images":
            west, south, east, north = map(float, query["bbox"].split(","))
            if max(east - west, north - south) >= 0.01:
                return 400, {"error": {"message": "bbox too large"}}
            found = served.search(
                images,
                lambda x: x["geometry"]["coordinates"],
                query["bbox"],
                query["limit"],
            )
            return 200, {"data": [{k: x[k] for k in wanted if k in x} for x in found]}
        name = path.strip("/")
        return 200, {"id": name, "thumb_original_url": f"{host}/{name}.jpg"}

    service.answer = answer


def test_mapillary_becomes_a_city_whose_groups_agree(
    service, clock, tmp_path, monkeypatch
):
    """Groups are moved to their cameras' own places; the token stays in the memory."""
    publish_mapillary(service)
    monkeypatch.setattr(mapillary, "PAGE", 8)
    service.faults = {"/expired.jpg": [403]}
    words = ["--source=mapillary", f"--bbox={BOX}", "--neighbourhoods=1"]
    words.append(f"--api=http://127.0.0.1:{service.port}")
    monkeypatch.delenv(mapillary.TOKEN, raising=False)
    with pytest.raises(ValueError, match="MAPILLARY_ACCESS_TOKEN is not set"):
        build(clock, *words, f"--out={tmp_path / 'a'}")
    monkeypatch.setenv(mapillary.TOKEN, "MLY|wrong")
    with pytest.raises(ValueError, match="refuses the token in MAPILLARY_ACCESS_TOKEN"):
        build(clock, *words, f"--out={tmp_path / 'a'}")
    monkeypatch.setenv(mapillary.TOKEN, served.TOKEN)
    kept = f"--from={tmp_path / 'kept'}"
    build(clock, *words, f"--out={tmp_path / 'a'}", kept)
    build(clock, *words, f"--out={tmp_path / 'b'}", kept, "--groups=apart")
    truth = ecef_from_enu(*synthetic.ANCHOR) @ np.concatenate(DRIVES)
    far = {}
    for name in "ab":
        city = City(tmp_path / name)
        assert len(city) == 24 and city.captures.anonymised.all()
        moved = (city.captures.ecef_from_camera - truth)[:, :3, 3]
        far[name] = np.linalg.norm(moved, axis=1)
    assert far["a"].max() < 0.01
    np.testing.assert_allclose(far["b"], np.repeat([3.0, 2.0], 12), atol=0.01)
    turned = np.rad2deg(headings(City(tmp_path / "a").captures.ecef_from_camera))
    np.testing.assert_allclose(turned, np.repeat([0.0, 90.0], 12), atol=1e-3)
    level = synthetic.direction_panorama(tilted(DRIVES[1][0], 90.0), 64).astype(int)
    assert np.abs(City(tmp_path / "a").panorama(20) - level)[4:-4].max() < 12
    report = json.loads((tmp_path / "a" / "import.json").read_text())
    assert any("merge_cc 100 moved -3.0 m east" in note for note in report["notes"])
    assert service.count("/0007.jpg") == 1 and service.count("/0006.jpg") == 1
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(b"MLY|" in content for content in files)
    for path, query, headers in service.asked:
        assert "MLY" not in json.dumps(query)
        assert not path.endswith(".jpg") or "Authorization" not in headers


def test_a_rotation_gives_back_heading_pitch_and_roll():
    level = synthetic.line([0, 0, 2], 30, 1)[0]
    for pitch, roll in itertools.product((-20.0, 0.0, 15.0), (-30.0, 0.0, 10.0)):
        told = mapillary.attitude_of(tilted(level, 0, pitch, roll)[:3, :3])
        np.testing.assert_allclose(list(told.values()), [30, pitch, roll], atol=1e-9)


def test_a_box_is_read_and_cut():
    box = listing.read_box("11.5,48.1,11.53,48.11")
    parts = list(listing.cut_box(box, 0.009))
    assert len(parts) == 4 * 2
    assert all(p[2] - p[0] < 0.0091 and p[3] - p[1] < 0.0091 for p in parts)
    assert sum((p[2] - p[0]) * (p[3] - p[1]) for p in parts) == pytest.approx(3e-4)
    with pytest.raises(ValueError, match="longitude first"):
        listing.read_box("48.1,11.5,48.11,11.4")
    with pytest.raises(ValueError, match="give WEST,SOUTH,EAST,NORTH"):
        listing.read_box("Munich")
