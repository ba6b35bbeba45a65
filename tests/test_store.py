"""A city on disk: round trips, crops equal to exact sampling, and clear refusals."""

import dataclasses
import errno
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import synthetic_city as synthetic
from full_disk import files_up_to

from cityrag_jax.data import captures, records, shards, writing
from cityrag_jax.data.columns import write_columns
from cityrag_jax.data.store import City
from cityrag_jax.data.takedown import remove_captures
from cityrag_jax.data.writing import Writing, write_city
from cityrag_jax.geo import panorama

DRIVES = [synthetic.line([0, 0, 2], 20, 4), synthetic.line([2, 0, 2], 200, 3)]
VIEW = {"height": 48, "width": 80}


@pytest.fixture(scope="module")
def city(tmp_path_factory) -> City:
    return synthetic.build(tmp_path_factory.mktemp("cities") / "gradient", DRIVES)


def write(folder, **changes):
    """Write the small city with some of its columns or pictures changed."""
    pictures = changes.pop("pictures", None)
    if pictures is None:
        poses = np.concatenate(DRIVES)
        pictures = [synthetic.direction_panorama(p, 128) for p in poses]
    captures = dataclasses.replace(synthetic.columns(DRIVES), **changes)
    return write_city(folder, synthetic.header(), captures, iter(pictures))


def test_columns_and_header_come_back_bit_for_bit(city):
    expected = synthetic.columns(DRIVES)
    for field in dataclasses.fields(expected):
        stored = getattr(city.captures, field.name)
        np.testing.assert_array_equal(stored, getattr(expected, field.name))
        assert stored.dtype == getattr(expected, field.name).dtype
    assert city.header == synthetic.header()
    assert len(city) == 7 and city.name == "Gradient"


def test_panoramas_come_back_up_to_jpeg(city):
    for k, pose in enumerate(np.concatenate(DRIVES)):
        expected = synthetic.direction_panorama(pose, 128).astype(int)
        assert np.abs(city.panorama(k) - expected).max() <= 6


@pytest.mark.parametrize("pitch_deg", [0.0, 30.0, -75.0, 90.0])
@pytest.mark.parametrize("fov_deg", [40.0, 65.0, 120.0])
def test_crops_equal_exact_sampling_of_the_stored_panorama(city, pitch_deg, fov_deg):
    """Fixed-point bilinear weights and rounding move a smooth picture by one grey."""
    yaw = np.array([0.0, 0.4, 3.1, 3.2, -9.0, 6.2, 1.57])
    captures = np.arange(7)
    crops = city.crops(captures, yaw, fov_deg=fov_deg, pitch_deg=pitch_deg, **VIEW)
    assert crops.dtype == np.uint8 and crops.shape == (7, 48, 80, 3)
    for k in captures:
        exact = panorama.crop_panorama(
            city.panorama(int(k)),
            yaw[k],
            fov_rad=np.deg2rad(fov_deg),
            pitch_rad=np.deg2rad(pitch_deg),
            **VIEW,
        )
        assert np.abs(crops[k] - exact).max() <= 1.5


def test_level_crops_decode_few_tiles(city, monkeypatch):
    decoded = []
    original = City._tile
    monkeypatch.setattr(City, "_tile", lambda *a: decoded.append(a[1:]) or original(*a))
    city.crops(np.zeros(40, int), np.linspace(0, 6, 40), fov_deg=65.0, **VIEW)
    assert len(decoded) / 40 < 2.6
    assert {row for _, row, _ in decoded} == {2}


def test_only_the_folder_travels_when_a_city_is_pickled(city):
    city.panorama(0)
    again = pickle.loads(pickle.dumps(city))
    np.testing.assert_array_equal(again.panorama(3), city.panorama(3))
    assert len(pickle.dumps(city)) < 1000


def test_a_forked_reader_works_without_tensorflow_and_without_networks(city):
    code = (
        "import os, sys\n"
        "from cityrag_jax.data.store import City\n"
        "city = City(sys.argv[1]); first = city.panorama(2)\n"
        "assert not {'tensorflow', 'flax'} & set(sys.modules)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if (city.panorama(2) == first).all() else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(city.folder)], timeout=60)
    assert done.returncode == 0


def test_many_threads_read_what_one_reads(city):
    captures, yaw = np.arange(7), np.linspace(0, 6, 7)
    alone = city.crops(captures, yaw, fov_deg=65.0, **VIEW)
    fresh = City(city.folder)
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(fresh.crops, captures, yaw, fov_deg=65.0, **VIEW)
            for _ in range(64)
        ]
        assert all(np.array_equal(job.result(), alone) for job in jobs)


def test_records_open_as_tensorflow_datasets(city):
    """Anyone can read the tiles by the usual means, in the documented order."""
    import tensorflow_datasets as tfds

    found = {}
    for name in ("horizon", "panoramas"):
        builder = tfds.builder_from_directory(city.folder / name / records.VERSION)
        found[name] = builder.as_data_source("train")
    assert [len(source) for source in found.values()] == [7 * 8, 7 * 32]
    for name, record, tile in (
        *(("horizon", 2 * 8 + 3, 19), ("panoramas", 2 * 32 + 15, 15)),
        ("panoramas", 2 * 32 + 16, 24),
    ):
        jpeg = bytes(found[name][record]["jpeg"])
        assert jpeg == city._record(2 * panorama.TILES + tile)
        assert jpeg[:2] == b"\xff\xd8"


def test_a_level_crop_reads_the_horizon_and_no_other_file(city, tmp_path):
    opened = City(copy_of(city, tmp_path))
    shutil.rmtree(opened.folder / "panoramas")
    opened._opened = os.getpid(), {}  # as Tiles, without what is gone
    horizon = records.Records(opened.folder / "horizon")
    for k in range(7 * 8):
        row = panorama.TILES * (k // 8) + 16 + k % 8
        opened._opened[1][row] = horizon[k]
    view, yaw = dict(height=480, width=832, fov_deg=65.0), np.linspace(0, 6, 7)
    np.testing.assert_array_equal(
        opened.crops(np.arange(7), yaw, **view), city.crops(np.arange(7), yaw, **view)
    )


def test_cities_of_the_form_before_stay_what_they_are(tmp_path, monkeypatch):
    """All rows of tiles lay together: read, appended to, taken out of as they are."""
    with monkeypatch.context() as patch:
        patch.setattr(shards, "APART", records.TOGETHER)
        patch.setattr(captures, "FORMAT_VERSION", 2)
        old = write(tmp_path / "old")
    assert json.loads((old.folder / "city.json").read_text())["format"] == 2
    view = dict(fov_deg=120.0, pitch_deg=30.0, **VIEW)
    new = write(tmp_path / "new")
    seen = new.crops(np.arange(7), np.zeros(7), **view)
    np.testing.assert_array_equal(old.crops(np.arange(7), np.zeros(7), **view), seen)
    remove_captures(old, np.arange(3))
    left = City(old.folder)
    pictures = [synthetic.direction_panorama(p, 128) for p in DRIVES[0][:3]]
    order = np.array([3, 4, 5, 6, 0, 1, 2])
    drive = np.array([0, 1, 1, 1, 2, 2, 2], np.int32)
    both = synthetic.columns(DRIVES).select(order)
    both = dataclasses.replace(both, drive=drive)
    how = Writing(quality=90, overwrite=True, before=left)
    grown = write_city(old.folder, synthetic.header(), both, pictures, how=how)
    assert not (old.folder / "horizon").exists()
    np.testing.assert_array_equal(
        grown.crops(np.arange(7), np.zeros(7), **view), seen[order]
    )


def test_pictures_and_poses_must_agree_in_number(tmp_path):
    pictures = [synthetic.direction_panorama(DRIVES[0][0], 128)] * 6
    with pytest.raises(ValueError, match="6 panoramas but 7 poses"):
        write(tmp_path / "few", pictures=pictures)
    with pytest.raises(ValueError, match="8 or more panoramas but 7 poses"):
        write(tmp_path / "many", pictures=pictures + pictures)
    assert os.listdir(tmp_path) == []  # nothing is left behind


def test_a_pose_that_is_no_rotation_is_named(tmp_path):
    poses = synthetic.columns(DRIVES).ecef_from_camera
    for change, message in (
        (np.diag([1, 1, 1.01, 1]), "pose of capture 3 is not a rotation"),
        (np.diag([1, 1, -1.0, 1]), "determinant -1.000000"),
        (np.full((4, 4), np.nan), "pose of capture 3"),
    ):
        bad = poses.copy()
        bad[3] = bad[3] @ change
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "bad", ecef_from_camera=bad)
    local = np.concatenate(DRIVES)
    with pytest.raises(ValueError, match="must be ECEF metres"):
        write(tmp_path / "bad", ecef_from_camera=local)


def test_columns_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match="7 times but 6 values of drive"):
        write(tmp_path / "bad", drive=np.zeros(6, np.int32))
    with pytest.raises(ValueError, match="those of drive 0 stand in several places"):
        write(tmp_path / "bad", drive=np.array([0, 0, 1, 1, 1, 0, 0], np.int32))
    with pytest.raises(ValueError, match="capture 1, taken at .* sort by time"):
        write(tmp_path / "bad", time_s=-np.arange(7.0))
    with pytest.raises(ValueError, match="licence runs from 0 to 1.* 1 entries"):
        write(tmp_path / "bad", licence=np.array([0, 0, 1, 0, 0, 0, 0], np.int32))
    picture = np.zeros((64, 128, 3), np.uint8)
    with pytest.raises(ValueError, match=r"panorama 0 is uint8 of \(64, 128, 3\)"):
        write(tmp_path / "bad", pictures=[picture])


def copy_of(city, tmp_path):
    return shutil.copytree(city.folder, tmp_path / "copy")


def test_missing_and_damaged_files_are_named(city, tmp_path):
    with pytest.raises(ValueError, match="is not a city"):
        City(tmp_path)
    folder = copy_of(city, tmp_path)
    (folder / "captures.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ValueError, match="captures.parquet is damaged"):
        City(folder)
    (folder / "captures.parquet").unlink()
    with pytest.raises(ValueError, match="captures.parquet is missing"):
        City(folder)
    document = json.loads((folder / "city.json").read_text())
    (folder / "city.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this program reads 3"):
        City(folder)
    (folder / "city.json").write_text("{")
    with pytest.raises(ValueError, match="city.json is damaged"):
        City(folder)


def test_poses_and_stored_panoramas_must_agree_on_opening(city, tmp_path):
    folder = copy_of(city, tmp_path)
    five = np.arange(7) < 5
    provenance = city.provenance.select(five)
    write_columns(folder, city.header, city.captures.select(five), provenance)
    with pytest.raises(ValueError, match="holds 7 panoramas but 5 poses"):
        City(folder)
    write_columns(folder, city.header, city.captures, city.provenance)
    for name in ("panoramas", "horizon"):
        for path in (folder / name / records.VERSION).glob("*array_record*"):
            path.unlink()
        with pytest.raises(ValueError, match=f"{name}-.*00000-of-00001 is missing"):
            City(folder)
    shutil.rmtree(folder / "panoramas")
    shutil.copytree(city.folder / "panoramas", folder / "panoramas")
    shutil.rmtree(folder / "horizon")
    with pytest.raises(ValueError, match="holds 5.6 panoramas but 7 poses"):
        City(folder)


def test_a_corrupt_jpeg_names_panorama_and_tile(tmp_path, monkeypatch):
    encode = writing.encode_panorama
    count = iter(range(100))

    def damaged(picture, quality):
        tiles = encode(picture, quality)
        if next(count) == 2:
            tiles[19] = tiles[19][:200]
        return tiles

    monkeypatch.setattr(writing, "encode_panorama", damaged)
    captures = synthetic.columns(DRIVES)
    pictures = [synthetic.direction_panorama(p, 128) for p in np.concatenate(DRIVES)]
    header, how = synthetic.header(), Writing(threads=1)
    bad = write_city(tmp_path / "bad", header, captures, pictures, how=how)
    with pytest.raises(ValueError, match="tile 19 .* of panorama 2 is not a readable"):
        bad.crops(np.array([2]), np.zeros(1), fov_deg=65.0, **VIEW)
    with pytest.raises(ValueError, match="of panorama 2"):
        bad.check_pictures()


def test_flipped_bytes_on_disk_are_an_error_not_a_picture(city, tmp_path):
    folder = copy_of(city, tmp_path)
    (path,) = (folder / "panoramas" / records.VERSION).glob("*array_record*")
    content = bytearray(path.read_bytes())
    for k in range(len(content) // 4, len(content) * 3 // 4, 97):
        content[k] ^= 0x55
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is not a readable JPEG"):
        City(folder).check_pictures()


def test_writing_twice_needs_overwrite_and_replaces_whole(tmp_path):
    write(tmp_path / "city")
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "city")
    one = synthetic.line([0, 0, 2], 0, 1)
    city = write_city(
        tmp_path / "city",
        synthetic.header("Other"),
        synthetic.columns([one]),
        [synthetic.direction_panorama(one[0], 128)],
        how=Writing(overwrite=True),
    )
    assert city.name == "Other" and len(City(tmp_path / "city")) == 1
    assert os.listdir(tmp_path) == ["city"]


def test_captures_out_of_range_are_refused(city):
    with pytest.raises(ValueError, match="captures 0 to 6, not 7"):
        city.panorama(7)


def test_a_writing_that_was_stopped_goes_on_behind_its_last_whole_file(
    tmp_path, monkeypatch
):
    """As a kill leaves it: with the same bytes in the end, and nothing made twice."""
    monkeypatch.setattr(shards, "SHARD", 2)
    poses, asked = np.concatenate(DRIVES), []

    def panoramas(killed_at, first, stop):
        for k in range(first, stop):
            asked.append(k)
            if k == killed_at:
                raise KeyboardInterrupt
            yield None if k == 1 else synthetic.direction_panorama(poses[k], 128)

    def build(folder, killed_at, overwrite=False):
        parts = functools.partial(panoramas, killed_at)
        columns, header = synthetic.columns(DRIVES), synthetic.header()
        how = Writing(threads=1, overwrite=overwrite)
        return write_city(folder, header, columns, parts, how=how)

    whole = build(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "city", 6)
    done = len(list((tmp_path / ".city.writing").glob("panoramas/*/*array*.json")))
    assert done == 3 and not (tmp_path / "city").exists()
    asked.clear()
    city = build(tmp_path / "city", None)
    assert asked == list(range(2 * done, 7))
    # Panorama 1 could not be read; its capture went with it.
    np.testing.assert_array_equal(
        city.captures.time_s, np.delete(synthetic.columns(DRIVES).time_s, 1)
    )
    files = sorted(whole.folder.glob("*/*/*array*"))
    assert len(files) == 8
    for path in files:
        again = city.folder / path.relative_to(whole.folder)
        assert again.read_bytes() == path.read_bytes()
    monkeypatch.setattr(records, "OPENED", 1)
    np.testing.assert_array_equal(
        city.crops(np.arange(6), np.zeros(6), fov_deg=65.0, **VIEW),
        whole.crops(np.arange(6), np.zeros(6), fov_deg=65.0, **VIEW),
    )
    assert len(city._opened[1]._where[19][0]._readers) == 1
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "city", 6, overwrite=True)
    assert len(City(tmp_path / "city")) == 6  # the old one, until the new one is whole


def test_a_full_disk_is_said_with_the_file_and_the_same_command_goes_on(tmp_path):
    """ArrayRecord's writer tells of it in the words of a RuntimeError."""
    with files_up_to(20_000), pytest.raises(OSError) as raised:
        write(tmp_path / "city")
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename.endswith("-train.array_record-00000-of-00001")
    assert not (tmp_path / "city").exists()
    assert len(write(tmp_path / "city")) == 7


def test_two_processes_do_not_write_one_city(tmp_path):
    (tmp_path / ".city.writing").mkdir()
    with writing.sole_writer(tmp_path / ".city.writing"):
        with pytest.raises(ValueError, match="being written by another process"):
            write(tmp_path / "city")


def test_a_city_without_digest_is_of_an_older_form(city, tmp_path):
    folder = copy_of(city, tmp_path)
    document = json.loads((folder / "city.json").read_text())
    del document["digest"]
    (folder / "city.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="older form, without digest; rebuild it with"):
        City(folder)


def test_a_file_that_cannot_be_opened_is_named(city, tmp_path):
    """Out of descriptors, the library says that a file is empty."""
    folder = copy_of(city, tmp_path)
    (path,) = (folder / "panoramas" / records.VERSION).glob("*array_record*")
    opened = City(folder)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="tile 0 .*00000-of-00001 holds 0 records"):
        opened.panorama(0)
