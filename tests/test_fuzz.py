"""Files that anyone may hand in, mangled: each is read, or refused in words.

A refusal is a ValueError that this package raises itself and that names the file;
whatever else comes out (a library's error, a hang) is a fault. What is read must be
sane: numbers that are finite, shapes that agree. 500 cases in `make test`, 5,000 in
`make test-faults`.
"""

import json
import pathlib
import time
from collections.abc import Callable

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic_city
from safetensors.numpy import save_file

from cityrag_jax.checkpoint import (
    Bundle,
    describe,
    load_bundle,
    read_config,
    save_bundle,
)
from cityrag_jax.checkpoint.digests import digest_json
from cityrag_jax.commands import is_refusal
from cityrag_jax.convert.files import CheckpointReader
from cityrag_jax.data.build import mine_city
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.paths import read_path
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image
from cityrag_jax.data.writing import write_city
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.vae import VAEConfig, WanVAE

ODD = (None, True, -1, 0, 1e308, "x", "", [], {}, [[]], -0.0, 2**70, "é", ["a", 1])
SLOW_S = 5.0  # far above any honest reading of these, on a busy machine

Rng = np.random.Generator


# How a file is mangled ----------------------------------------------------------------


def mangle_bytes(content: bytes, rng: Rng) -> bytes:
    """Flip, cut, repeat or overwrite some bytes."""
    content = bytearray(content)
    place, length = int(rng.integers(len(content))), int(rng.integers(1, 16))
    match rng.integers(5):
        case 0:
            content[place] ^= 1 << int(rng.integers(8))
        case 1:
            del content[place:]
        case 2:
            del content[place : place + length]
        case 3:
            content[place:place] = content[place : place + length] * 3
        case 4:
            content[place : place + length] = rng.bytes(length)
    return bytes(content)


def mangle_json(value, rng: Rng):
    """Replace, remove or add something, anywhere in a document."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = list(value)[rng.integers(len(value))]
        kept = {n: x for n, x in value.items() if n != name}
        match rng.integers(8):
            case 0:
                return kept
            case 1:
                return kept | {f"{name}s": value[name]}
            case _:
                return value | {name: mangle_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = int(rng.integers(len(value)))
        return [*value[:i], mangle_json(value[i], rng), *value[i + 1 :]]
    return ODD[rng.integers(len(ODD))]


def mangle_table(table: pa.Table, rng: Rng) -> pa.Table:
    """Change a column's type, shape or some value, leave it out, or cut all short."""
    place = int(rng.integers(table.num_columns))
    name, column = table.column_names[place], table.column(place)
    count, odd = len(column), ODD[rng.integers(len(ODD))]
    changed = [
        pa.array(["x"] * count),
        pa.array([[1.0, 2.0]] * count),
        pa.array([[1.0] * 12] * count),
        pa.nulls(count, column.type),
        pa.array([float("nan")] * count),
        pa.array([1e30] * count),
        pa.array([-1] * count),
        pa.array([2**60] * count),
        pa.array([json.dumps(odd, default=str)] * count),
    ]
    choice = int(rng.integers(len(changed) + 3))
    if choice < len(changed):
        return table.set_column(place, name, changed[choice])
    if choice == len(changed):
        return table.drop_columns([name])
    if choice == len(changed) + 1:
        return table.slice(0, int(rng.integers(count)))
    return table.replace_schema_metadata(None)


# What is read -------------------------------------------------------------------------


class Target:
    """A folder with a whole file of some kind, how to mangle it, how to read it."""

    def __init__(self, folder: pathlib.Path, file: str):
        self.folder, self.file = folder, folder / file
        self.whole = self.file.read_bytes()

    def mangled(self, rng: Rng) -> bytes:
        return mangle_bytes(self.whole, rng)

    def read(self) -> None:
        raise NotImplementedError


class ModelConfig(Target):
    def mangled(self, rng):
        if rng.random() < 0.2:
            return super().mangled(rng)
        told = json.loads(self.whole)
        del told["digest"]
        told = mangle_json(told, rng)
        if isinstance(told, dict):
            told["digest"] = digest_json(told)  # of who wrote this nonsense
        return json.dumps(told).encode()

    def read(self):
        for description in load_bundle(self.folder).descriptions.values():
            read_config(description)


class CityColumns(Target):
    def mangled(self, rng):
        if rng.random() < 0.3:
            return super().mangled(rng)
        table = mangle_table(pq.read_table(self.file), rng)
        if rng.random() < 0.5:  # of who wrote this nonsense without our digest
            table = table.replace_schema_metadata(None)
        made = pa.BufferOutputStream()
        pq.write_table(table, made)
        return made.getvalue().to_pybytes()

    def read(self):
        city = City(self.folder)
        assert np.isfinite(city.captures.ecef_from_camera).all()
        assert city.index is not None


class CityPairs(CityColumns):
    def read(self):
        city, pairs = City(self.folder), load_pairs(self.folder)
        assert len(pairs.training) + len(pairs.evaluation) == len(pairs)
        assert len(city)


class CityHeader(ModelConfig):
    def read(self):
        City(self.folder)


class Tensors(Target):
    def mangled(self, rng):
        """Mostly the header: its length is the first eight bytes."""
        end = 8 + int.from_bytes(self.whole[:8], "little")
        if rng.random() < 0.5:
            return mangle_bytes(self.whole[:end], rng) + self.whole[end:]
        header = mangle_json(json.loads(self.whole[8:end]), rng)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + self.whole[end:]

    def read(self):
        reader = CheckpointReader(self.file)
        for name in reader.names():
            assert reader.read(name).shape == reader.shape(name)


class DrawnPath(Target):
    def __init__(self, folder, file, city):
        super().__init__(folder, file)
        self.city = city

    def mangled(self, rng):
        if self.file.suffix == ".csv" or rng.random() < 0.4:
            return super().mangled(rng)
        return json.dumps(mangle_json(json.loads(self.whole), rng)).encode()

    def read(self):
        poses = read_path(self.file, self.city, 0.5)
        assert np.isfinite(poses).all() and len(poses) > 1


class Picture(Target):
    def read(self):
        picture = read_image(self.file)
        assert picture.ndim == 3 and picture.size


def make_targets(folder: pathlib.Path) -> list[Target]:
    config = DiTConfig(dim=16, num_heads=2, num_layers=2, ffn_dim=24, in_channels=36)
    told = {"transformer": describe(WanDiT, config, ((GeoBranch, {}),))}
    told["vae"] = describe(WanVAE, VAEConfig(base_dim=4))
    text = np.ones((2, 8), np.float32)
    save_bundle(folder / "model", Bundle({}, told, text))
    drives = [synthetic_city.line((0, y, 2), 90, 12) for y in (0, 1, 200, 201)]
    poses = [pose for drive in drives for pose in drive]
    pictures = (synthetic_city.direction_panorama(pose, 128) for pose in poses)
    columns = synthetic_city.columns(drives, neighbourhoods=[0, 0, 1, 1])
    city = write_city(folder / "city", synthetic_city.header(), columns, pictures)
    mine_city(folder / "city", num_frames=5, held_out_fraction=0.5)
    save_file(
        {"a": np.ones((3, 4), np.float32), "b": np.ones(5)}, folder / "a.safetensors"
    )
    places = geodetic_from_ecef(columns.ecef_from_camera[:4, :3, 3])
    rows = np.stack([places[1], places[0], places[2]], -1).tolist()
    line = {"type": "LineString", "coordinates": rows}
    feature = {"type": "Feature", "geometry": line, "properties": {}}
    collection = {"type": "FeatureCollection", "features": [feature]}
    (folder / "path.geojson").write_text(json.dumps(collection))
    lines = [f"{row[1]},{row[0]},{row[2]}" for row in rows]
    (folder / "path.csv").write_text("\n".join(["latitude,longitude,height", *lines]))
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    for name in ("photo.jpg", "photo.png"):
        cv2.imwrite(str(folder / name), picture)
    return [
        ModelConfig(folder / "model", "config.json"),
        CityHeader(folder / "city", "city.json"),
        CityColumns(folder / "city", "captures.parquet"),
        CityPairs(folder / "city", "pairs.parquet"),
        Tensors(folder, "a.safetensors"),
        DrawnPath(folder, "path.geojson", city),
        DrawnPath(folder, "path.csv", city),
        Picture(folder, "photo.jpg"),
        Picture(folder, "photo.png"),
    ]


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> list[Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


def try_one(target: Target, content: bytes, describe: Callable[[], str]) -> bool:
    """Read a mangled file; say if it was refused. Fails on anything unworthy."""
    target.file.write_bytes(content)
    began = time.monotonic()
    try:
        target.read()
        return False
    except Exception as error:
        assert is_refusal(error), f"{describe()}: {type(error).__name__}: {error}"
        # Of a checksum that fits no text either file may be wrong: the folder is named.
        named = target.file.name in str(error) or f"{target.folder} is" in str(error)
        assert named, f"{describe()}: no file in: {error}"
        return True
    finally:
        target.file.write_bytes(target.whole)
        assert time.monotonic() - began < SLOW_S, describe()


@pytest.mark.parametrize("kind", range(9))
@pytest.mark.parametrize(
    "cases", [56, pytest.param(556, marks=pytest.mark.faults)], ids=["500", "5000"]
)
def test_mangled_files_are_read_or_refused_in_words(targets, kind, cases, capfd):
    target = targets[kind]
    target.read()
    refused = 0
    for seed in range(cases):
        rng = np.random.default_rng((kind, seed))
        content = target.mangled(rng)
        refused += try_one(target, content, lambda s=seed: f"{target.file.name}, {s}")
    assert refused > cases / 10, "the mangling does too little"
    target.read()
