"""A city in an object store is read like one on a disk, and fetched but once."""

import importlib
import pickle
import shutil

import numpy as np
import pytest
import synthetic_city as synthetic
import training_city
from fsspec.implementations.memory import MemoryFileSystem
from test_survey import run, write_path

from cityrag_jax.data import remote
from cityrag_jax.data.build import mine_city
from cityrag_jax.data.masks import cover_views
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.data.takedown import remove_captures
from cityrag_jax.data.video import write_image
from cityrag_jax.training.examples import open_cities

VIEW = dict(height=48, width=80, fov_deg=65.0)


class Bucket(MemoryFileSystem):
    """What a store's library offers fsspec, in this process's memory."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs = [""]
    opened: list[str] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **kwargs):
        self.opened.append(path)
        return super()._open(path, mode, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_city.build_city(tmp_path_factory.mktemp("remote") / "city")


@pytest.fixture
def bucket(folder, tmp_path, monkeypatch):
    """The city as gs://streets/munich, and a machine that has never read it."""
    monkeypatch.setenv("CITYRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EPATH_USE_TF", "false")
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.setitem(known, "gcs", Bucket)
    upload(folder)
    yield Bucket()
    Bucket.store.clear()


def upload(folder):
    files = Bucket()
    for path in folder.rglob("*"):
        if path.is_file():
            place = f"/streets/munich/{path.relative_to(folder).as_posix()}"
            files.pipe_file(place, path.read_bytes())
    Bucket.opened.clear()


def fetched():
    """Give the files of tiles that were asked for since."""
    names = sorted(
        {path.split("/")[-3] for path in Bucket.opened if "_record-" in path}
    )
    Bucket.opened.clear()
    return names


def test_crops_are_those_of_the_disk_and_the_horizon_is_all_they_fetch(folder, bucket):
    here, there = City(folder), City("gs://streets/munich")
    assert len(there) == len(here) and fetched() == []
    captures, yaw = np.arange(0, 180, 9), np.linspace(0, 6, 20)
    seen = here.crops(captures, yaw, **VIEW)
    np.testing.assert_array_equal(there.crops(captures, yaw, **VIEW), seen)
    assert fetched() == ["horizon"]
    # Of this machine's other processes none fetches it again, by either name.
    for again in (pickle.loads(pickle.dumps(there)), City("gs:/streets/munich/")):
        np.testing.assert_array_equal(again.crops(captures, yaw, **VIEW), seen)
    assert fetched() == []
    np.testing.assert_array_equal(there.panorama(5), here.panorama(5))
    assert fetched() == ["panoramas"]
    theirs, ours = load_pairs(there.folder), load_pairs(folder)
    np.testing.assert_array_equal(theirs.start_b, ours.start_b)
    ((city, pairs),) = open_cities("gs://streets/munich")
    assert city.folder == there.folder and len(pairs) == len(ours)


def test_a_survey_through_the_door(bucket, tmp_path, capsys):
    path = write_path(tmp_path / "walk.csv", [(0.2, 1), (0.2, 15)])
    words = ["--city=gs://streets/munich", f"--path={path}", "--spacing-m=1"]
    run(*words, f"--out={tmp_path / 'out'}", "--height=32", "--width=64")
    assert "100% within 2 m" in capsys.readouterr().out
    assert (tmp_path / "out" / "conditions.mp4").exists()
    assert fetched() == ["horizon"]


def test_masks_come_when_their_captures_are_shown(folder, bucket, tmp_path):
    city = City("gs://streets/munich")
    city.captures.anonymised[:2] = False
    name = city.provenance.id[1].as_py()
    shutil.copytree(folder, tmp_path / "masked")
    path = tmp_path / "masked" / "masks" / f"{name}.png"
    path.parent.mkdir()
    write_image(path, np.full((8, 16, 3), 255, np.uint8))
    bucket.pipe_file(f"/streets/munich/masks/{name}.png", path.read_bytes())
    frames = city.crops(np.arange(3), np.zeros(3), **VIEW)
    covered, shown = cover_views(city, np.arange(3), np.zeros(3), frames, 65.0)
    assert shown == (2, 1) and np.any(covered[1] != frames[1])
    np.testing.assert_array_equal(covered[::2], frames[::2])


def test_a_city_that_was_built_again_is_another(bucket, tmp_path):
    before = City("gs://streets/munich")
    before.panorama(0)
    drives = [synthetic.line([0, 0, 2], 0, 9)]
    other = synthetic.build(tmp_path / "other", drives)
    upload(other.folder)
    after = City("gs://streets/munich")
    assert len(after) == 9 and after.folder != before.folder
    np.testing.assert_array_equal(after.panorama(8), other.panorama(8))
    assert len(City(before.folder)) == 180


def test_what_cannot_be_read_or_written_is_said(bucket, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="gs://streets/rome holds none of city.json"):
        City("gs://streets/rome")
    city = City("gs://streets/munich")
    for change in (
        lambda: mine_city("gs://streets/munich"),
        lambda: remove_captures(city, np.arange(2)),
        lambda: synthetic.build("gs://streets/rome", [synthetic.line([0, 0, 2], 0, 2)]),
    ):
        with pytest.raises(ValueError, match="gs:/+streets/.* store, which is only re"):
            change()
    city.crops(np.zeros(1, int), np.zeros(1), **VIEW)
    (path,) = city.folder.glob("horizon/*/*record-*")
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(ValueError, match="is not a readable.*it is fetched anew"):
        City(city.folder).crops(np.zeros(1, int), np.zeros(1), **VIEW)
    (city.folder / "origin.json").write_text("{}")
    with pytest.raises(ValueError, match="origin.json is damaged.*it is fetched anew"):
        City(city.folder)
    Bucket.store.pop(
        "/streets/munich/horizon/1.0.0/horizon-train.array_record-00000-of-00001"
    )
    fresh = tmp_path / "elsewhere"
    monkeypatch.setenv("CITYRAG_CACHE", str(fresh))
    with pytest.raises(ValueError, match="horizon-train.*00000-of-00001 is missing"):
        City("gs://streets/munich")
    with pytest.raises(ValueError, match="s3://x cannot be read: ImportError.*s3fs"):
        City("s3://x")
    assert not remote.is_remote("C:/x") and not remote.is_remote("./gs:x")
