"""A city that grows: nothing is written twice, and the old one stays until the end."""

import dataclasses

import numpy as np
import pytest
import synthetic_city as synthetic
from test_importers import DRIVES, EVENING, MORNING, WHOSE, build, photograph

from cityrag_jax.data import shards
from cityrag_jax.data.append import append_city, join_neighbourhoods
from cityrag_jax.data.captures import CityHeader
from cityrag_jax.data.pairs import load_pairs, read_rules
from cityrag_jax.data.provenance import make_provenance
from cityrag_jax.data.store import City

FAR = [drive + 3000.0 * np.eye(4)[0][:, None] * np.eye(4)[3] for drive in DRIVES]


def files_of(folder):
    """Give each of a city's files of panoramas: which it is on the disk, and length."""
    paths = sorted(folder.glob("panoramas/*/*array_record*"))
    return [(path.stat().st_ino, path.stat().st_size) for path in paths]


def test_a_city_is_appended_to_killed_and_resumed(tmp_path, monkeypatch, capsys):
    """By the command line: two drives first, two more streets and hours later."""
    monkeypatch.setattr(shards, "SHARD", 10)
    photos, out = tmp_path / "photos", tmp_path / "munich"
    photograph(photos / "morning", DRIVES[0], MORNING)
    photograph(photos / "evening", DRIVES[1], EVENING)
    command = ("--source=folder", f"--from={photos}", f"--out={out}", *WHOSE)
    build(*command, "--num-frames=9", "--held-out-fraction=1", "--spacing-m=1")
    before, old_files = City(out), files_of(out)
    old_ids = before.provenance.id.to_pylist()
    crop = dict(height=16, width=16, fov_deg=65.0)
    seen = before.crops(np.arange(48), np.zeros(48), **crop)
    opened = City(out)
    rules, pairs = read_rules(out), load_pairs(out)
    assert rules["held_out"] == (0,) and pairs.held_out.all()

    photograph(photos / "noon", FAR[0], MORNING + 86400)
    photograph(photos / "night", FAR[1], EVENING + 86400)
    write, left = shards._write_files, iter(range(2))

    def killed_behind_the_second(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write(*given)

    monkeypatch.setattr(shards, "_write_files", killed_behind_the_second)
    with pytest.raises(KeyboardInterrupt):
        build(*command, "--append")
    assert files_of(out) == old_files and len(City(out)) == 48  # as it was
    np.testing.assert_array_equal(load_pairs(out).start_a, pairs.start_a)
    written = []
    monkeypatch.setattr(
        shards,
        "_write_files",
        lambda *a: written.append(a[0]["horizon"].name) or write(*a),
    )
    build(*command, "--append")
    assert [name[-14:] for name in written] == [f"0000{k}-of-00010" for k in (7, 8, 9)]

    with pytest.raises(ValueError, match="open it again"):
        _ = opened.provenance
    city = City(out)
    assert files_of(out)[:5] == old_files  # the very files
    ids = city.provenance.id.to_pylist()
    assert ids[:48] == old_ids and len(set(ids)) == 96
    assert ids[48] == "night/IMG_0000.JPG"
    np.testing.assert_array_equal(city.crops(np.arange(48), np.zeros(48), **crop), seen)
    there = city.crops(np.array([96 - 1]), np.zeros(1), **crop)
    assert np.abs(there.astype(int) - seen[47]).mean() < 3  # both look north
    assert city.captures.drive.tolist() == np.repeat([0, 1, 2, 3], 24).tolist()
    grown = load_pairs(out)
    old = grown.start_a < 48
    np.testing.assert_array_equal(grown.start_a[old], pairs.start_a)
    assert grown.held_out[old].all() and not grown.held_out[~old].any()
    assert (~old).any() and read_rules(out) == rules
    assert "48 pictures are there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds all of 96 pictures"):
        build(*command, "--append")
    other = tmp_path / "other"
    photograph(other / "morning", DRIVES[0][:3], MORNING + 5000)
    with pytest.raises(ValueError, match="'morning/IMG_0000.JPG' taken at .* this one"):
        build(*command[:1], f"--from={other}", *command[2:], "--append")
    with pytest.raises(ValueError, match="must be one, and stay"):
        build(*command, "--append", "--overwrite")
    with pytest.raises(ValueError, match="are 64 high, those to append 32"):
        photograph(other / "more", FAR[0][:9], MORNING + 5000)
        (other / "morning").rename(tmp_path / "morning")
        build(*command[:1], f"--from={other}", *command[2:], "--append", "--height=32")
    # What is appended keeps the city's spacing, as if imported with it.
    with pytest.raises(ValueError, match="with --spacing-m=1, not 2: leave it out"):
        build(*command, "--append", "--spacing-m=2")
    sparse = tmp_path / "sparse"
    photograph(sparse / "later", synthetic.line([9, 0, 2], 0, 8, 5.0), MORNING)
    with pytest.raises(ValueError, match="5 m apart, wider than the 1 m wanted"):
        build(*command[:1], f"--from={sparse}", *command[2:], "--append")
    assert len(City(out)) == 96


def test_words_are_joined_and_streets_keep_their_neighbourhood(tmp_path):
    """A street that is held out stays so when somebody else drives it."""
    city = synthetic.build(tmp_path / "city", DRIVES, neighbourhoods=[5, 5])
    third = synthetic.line([3.0, -20, 2], 0, 20)
    columns = synthetic.columns([third, FAR[0]], times_s=[1.8e9, 1.9e9])
    columns = dataclasses.replace(columns, licence=columns.drive)
    words = ("CC-BY-4.0", "CC0-1.0")
    header = CityHeader("more", 128, synthetic.ANCHOR, words, ("somebody",))
    np.testing.assert_array_equal(
        join_neighbourhoods(city.captures, columns), [5] * 20 + [6] * 24
    )
    names = [f"more/{k}" for k in range(44)]
    pictures = [synthetic.direction_panorama(third[0], 128)] * 44
    grown = append_city(
        city, header, columns, pictures, provenance=make_provenance(names, names)
    )
    assert grown.header.licences == ("CC0-1.0", "CC-BY-4.0")
    assert grown.header.attributions == ("nobody", "somebody")
    assert grown.captures.licence.tolist() == [0] * 48 + [1] * 20 + [0] * 24
    assert grown.captures.attribution.tolist() == [0] * 48 + [1] * 44
    assert grown.name == city.name and len(grown.header.generator["appended"]) == 1
