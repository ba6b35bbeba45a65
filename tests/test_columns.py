"""A city's columns on disk: as they were, and open in other people's programs."""

import dataclasses
import json
import shutil

import duckdb
import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic_city as synthetic

from cityrag_jax.data.build import mine_city
from cityrag_jax.data.columns import read_captures, read_provenance, write_columns
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.provenance import make_provenance, number_captures
from cityrag_jax.data.store import City
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.geo.poses import poses_from_geodetic

DRIVES = [synthetic.line([0, y, 2], 90, 30) for y in (0.0, 1.0, 400.0, 401.0)]


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns") / "city"
    return synthetic.build(folder, DRIVES, neighbourhoods=[0, 0, 1, 1])


def test_columns_come_back_to_the_last_bit(tmp_path, rng):
    """Times of today, too, though they are stored as whole nanoseconds."""
    columns = synthetic.columns(DRIVES)
    count = len(columns)
    columns = dataclasses.replace(
        columns,
        time_s=columns.time_s + np.sort(rng.random(count)) / 100,
        licence=rng.integers(0, 3, count).astype(np.int32),
    )
    words = ("CC0-1.0", "CC-BY-4.0", "etalab-2.0")
    header = dataclasses.replace(synthetic.header(), licences=words)
    names = [f"paris/é{k}.jpg" for k in range(count)]
    given = make_provenance(
        names,
        ["paris"] * count,
        [None, "https://example.org/1", *[None] * (count - 2)],
        height_datum="geoid",
        accuracy_m=2.5,
        levelled=[True] * 7 + [False] * (count - 7),
    )
    write_columns(tmp_path, header, columns, given)
    again = read_captures(tmp_path, header)
    for name, column in vars(columns).items():
        stored = getattr(again, name)
        assert stored.dtype == column.dtype
        np.testing.assert_array_equal(stored, column, err_msg=name)
    assert all(
        a.equals(b)
        for a, b in zip(*map(_arrays, (read_provenance(tmp_path), given)), strict=True)
    )


def _arrays(provenance):
    return vars(provenance).values()


def test_geopandas_opens_a_city_and_what_it_writes_is_a_city_again(city, tmp_path):
    """As one does who draws districts: places, headings and names are where STAC has
    them, and a column that was changed is read, checked, and its pairs mined again."""
    folder = shutil.copytree(city.folder, tmp_path / "city")
    path = folder / "captures.parquet"
    mine_city(folder, num_frames=8, held_out_fraction=0.5)
    geo = json.loads(pq.read_schema(path).metadata[b"geo"])
    assert geo["version"] == "1.1.0" and geo["primary_column"] == "geometry"
    assert geo["columns"]["geometry"]["geometry_types"] == ["Point Z"]
    frame = geopandas.read_parquet(path)
    assert frame.crs == "OGC:CRS84" and frame["id"].is_unique
    places = np.stack([frame.geometry.y, frame.geometry.x, frame.geometry.z])
    poses = city.captures.ecef_from_camera
    np.testing.assert_array_equal(places, geodetic_from_ecef(poses[:, :3, 3]))
    box = geo["columns"]["geometry"]["bbox"]
    np.testing.assert_array_equal(frame.total_bounds, [*box[:2], *box[3:5]])
    told = poses_from_geodetic(
        *places,
        *(
            frame[f"{name}"].to_numpy()
            for name in ("view:azimuth", "pers:pitch", "pers:roll")
        ),
    )
    # Angles go through degrees: a few last bits of a turn.
    np.testing.assert_allclose(told[:, :3, :3], poses[:, :3, :3], atol=1e-12)
    assert set(frame["license"]) == {"CC0-1.0"}
    frame["neighbourhood"] = frame["drive"].astype("int64")
    frame.to_parquet(path)
    changed = City(folder)
    np.testing.assert_array_equal(
        changed.captures.neighbourhood, changed.captures.drive
    )
    with pytest.raises(ValueError, match="mined from other captures"):
        load_pairs(folder)
    frame["drive"] = [1, 0] * (len(frame) // 2)
    frame.to_parquet(path)
    with pytest.raises(ValueError, match="those of drive 0 stand in several places"):
        City(folder)


def test_duckdb_asks_a_city(city):
    """As one does who counts what a city holds, or chooses captures of it."""
    path = city.folder / "captures.parquet"
    asked = f"SELECT drive, count(*), min(id), max(datetime) FROM '{path}' GROUP BY 1"
    rows = duckdb.sql(f"{asked} ORDER BY 1").fetchall()
    drives, counts = np.unique(city.captures.drive, return_counts=True)
    assert [row[:2] for row in rows] == list(zip(drives, counts, strict=True))
    assert rows[0][2] == city.provenance.id[0].as_py()
    latest = [row[3].timestamp() for row in rows]
    times_s = [city.captures.time_s[city.captures.drive == k].max() for k in drives]
    np.testing.assert_allclose(latest, times_s, atol=1e-6, rtol=0)  # microseconds
    asked = f"SELECT ecef_from_camera[4], ecef_from_camera[8] FROM '{path}' LIMIT 2"
    placed = np.array(duckdb.sql(asked).fetchall())
    np.testing.assert_array_equal(placed, city.captures.ecef_from_camera[:2, :2, 3])


def test_what_was_changed_in_place_is_noticed(city, tmp_path):
    """Checksums of pages do not see a program that keeps our notes."""
    folder = shutil.copytree(city.folder, tmp_path / "city")
    path = folder / "captures.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("drive")
    pq.write_table(table.set_column(place, "drive", pa.array([0] * len(table))), path)
    with pytest.raises(ValueError, match="damaged, or was changed: its columns have"):
        City(folder)
    document = json.loads((folder / "city.json").read_text())
    assert document["format"] == 3


def test_ids_stay_and_are_alone(tmp_path):
    columns, header = synthetic.columns(DRIVES), synthetic.header()
    provenance = number_captures(columns)
    ids = provenance.id.to_pylist()
    assert ids[:2] == ["0-00000", "0-00001"] and ids[-1] == "3-00029"
    some = np.arange(len(ids)) != 1
    assert provenance.select(some).id.to_pylist() == [ids[0], *ids[2:]]
    twice = dataclasses.replace(provenance, id=pa.array(["a", *ids[1:-1], "a"]))
    with pytest.raises(ValueError, match="1 ids stand more than once, such as 'a'"):
        write_columns(tmp_path, header, columns, twice)
    geoid = make_provenance(ids, ids, height_datum="EGM96")
    with pytest.raises(ValueError, match="'EGM96' is unknown; use one of ellipsoid"):
        write_columns(tmp_path, header, columns, geoid)
    with pytest.raises(ValueError, match="120 captures but 119 values of id"):
        write_columns(tmp_path, header, columns, provenance.select(some))
    with pytest.raises(ValueError, match="captures without an id"):
        write_columns(tmp_path, header, columns, make_provenance([""] * 120, ids))
    assert not list(tmp_path.iterdir())
