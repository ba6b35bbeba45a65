"""What somebody wants out of a city is out of it, and the rest is as it was."""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
import synthetic_city as synthetic

from cityrag_jax.data import records, shards, takedown
from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.data.pairs import PairConfig, load_pairs, save_pairs
from cityrag_jax.data.store import City

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "takedown.py"
GONE = ["0-00007", "1-00021"]
ROWS = [7, 30 + 21]


def take_down(*words):
    spec = importlib.util.spec_from_file_location("takedown_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(tool.COMMAND.parse([*map(str, words)]))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two drives of 30 captures along a street, 8 panoramas a file."""
    folder = tmp_path_factory.mktemp("taken") / "city"
    drives = [synthetic.line([x, 0, 2], 0, 30) for x in (0.0, 1.5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 8)
        city = synthetic.build(folder, drives, height=40)
    config = PairConfig(num_frames=5, min_condition=4, stride=1)
    save_pairs(folder, mine_pairs(city.captures, city.name, config))
    (folder / "import.json").write_text("{}")
    return city


@pytest.fixture
def city(built, tmp_path):
    shutil.copytree(built.folder, tmp_path / "city")
    return City(tmp_path / "city")


def files_of(city):
    return sorted(city.folder.glob("horizon/*/*record-*"))


def test_captures_go_with_tiles_and_pairs_and_all_else_stays(city, capsys):
    before, inodes = load_pairs(city.folder), [p.stat().st_ino for p in files_of(city)]
    kept = np.setdiff1d(np.arange(60), ROWS)
    pictures = [city.panorama(int(k)) for k in kept[::9]]
    ids = city.provenance.id.to_pylist()
    take_down(f"--city={city.folder}", *(f"--id={name}" for name in GONE))
    left = City(city.folder)
    remaining = [name for name in ids if name not in GONE]
    assert left.provenance.id.to_pylist() == remaining
    np.testing.assert_array_equal(left.captures.time_s, city.captures.time_s[kept])
    for k, picture in zip(range(0, 58, 9), pictures, strict=True):
        np.testing.assert_array_equal(left.panorama(k), picture)
    changed = [p.stat().st_ino not in inodes for p in files_of(left)]
    assert changed == [True, False, False, False, False, False, True, False]
    parts = [records.dataset_info(left.folder / name) for name in records.APART]
    tiles = [left._record(k) for k in range(58 * 40)]
    assert sum(part["numBytes"] for part in parts) == sum(map(len, tiles))
    # Those pairs remain, in order, whose windows and conditions held neither.
    after, numbers = load_pairs(left.folder), {int(k): i for i, k in enumerate(kept)}
    shown = [
        set(range(a, a + 5)) | set(range(b, min(b + 10, 30 * (b // 30 + 1))))
        for a, b in zip(before.start_a.tolist(), before.start_b.tolist(), strict=True)
    ]
    whole = [k for k, rows in enumerate(shown) if not rows & set(ROWS)]
    assert 0 < len(whole) < len(before)
    assert after.start_a.tolist() == [numbers[int(before.start_a[k])] for k in whole]
    assert after.start_b.tolist() == [numbers[int(before.start_b[k])] for k in whole]
    assert (left.folder / "import.json").exists()
    assert "58 captures left" in capsys.readouterr().out
    assert [p.name for p in left.folder.parent.iterdir()] == ["city"]
    with pytest.raises(ValueError, match="has no capture '0-00007'; ids are those of"):
        takedown.find_captures(left, GONE[:1])


def test_a_file_that_holds_nothing_else_goes(city):
    """And its neighbours are named anew."""
    picture = city.panorama(16)
    takedown.remove_captures(city, np.arange(8, 16))
    left = City(city.folder)
    assert len(left) == 52 and len(files_of(left)) == len(files_of(city)) == 7
    np.testing.assert_array_equal(left.panorama(8), picture)
    with pytest.raises(ValueError, match="no capture any more; remove the folder"):
        takedown.remove_captures(left, np.arange(52))


def test_a_killed_takedown_leaves_the_city_and_is_given_again(city, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    take_place = takedown.take_place
    monkeypatch.setattr(takedown, "take_place", killed)
    with pytest.raises(KeyboardInterrupt):
        takedown.remove_captures(city, np.array(ROWS))
    assert len(City(city.folder)) == 60 and len(load_pairs(city.folder)) > 0
    monkeypatch.setattr(takedown, "take_place", take_place)
    assert takedown.remove_captures(city, np.array(ROWS))["captures"] == 2
    assert len(City(city.folder)) == 58


def test_what_was_made_of_them_is_found(city, tmp_path, capsys):
    """Videos are listed, latents go, pictures go and are not imported again."""
    for name, ids, where in (
        ("a", ["0-00001", GONE[0]], "Gradient"),
        ("b", ["0-00001"], "Gradient"),
        ("c", GONE, "elsewhere"),
    ):
        folder = tmp_path / "videos" / name
        folder.mkdir(parents=True)
        facts = {"city": where, "clips": [{"captures": [{"ids": ids}]}]}
        (folder / "generate.json").write_text(json.dumps(facts))
    for name in ("Gradient", "elsewhere"):
        (tmp_path / "latents" / name).mkdir(parents=True)
        record = tmp_path / "latents" / name / "latents.json"
        record.write_text(json.dumps({"pairs": {name: 3}}))
    pictures = tmp_path / "pictures" / "s"
    pictures.mkdir(parents=True)
    for name in (*GONE, "0-00001"):
        (pictures / f"{name}.jpg").write_bytes(b"jpeg")
    words = [f"--city={city.folder}", f"--id={GONE[0]}", f"--id={GONE[1]}"]
    words += [f"--videos={tmp_path / 'videos'}", f"--pictures={tmp_path / 'pictures'}"]
    words += [
        f"--latents={tmp_path / 'latents' / n}" for n in ("Gradient", "elsewhere")
    ]
    take_down(*words, "--dry-run")
    said = capsys.readouterr().out
    assert f"made from them: {tmp_path / 'videos' / 'a'}" in said and "/b" not in said
    assert "would take 2 of 60 captures" in said and len(City(city.folder)) == 60
    take_down(*words)
    assert [p.name for p in (tmp_path / "latents").iterdir()] == ["elsewhere"]
    assert [p.name for p in pictures.iterdir()] == ["0-00001.jpg"]
    assert takedown.read_taken(tmp_path / "pictures") == set(GONE)
    with pytest.raises(ValueError, match="holds no latents"):
        takedown.holds_latents(tmp_path, "Gradient")
