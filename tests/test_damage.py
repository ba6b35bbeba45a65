"""One flipped bit, anywhere on disk, is found before anything is made of it.

A flip that changes nothing of what is read (an unused page, a time stamp) is allowed
and does not count; one that does must be refused, naming the folder. Three flips for
each kind of folder in `make test`, fifty in `make test-faults`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_city

from cityrag_jax.checkpoint import (
    Bundle,
    TrainingCheckpoints,
    describe,
    latest_model,
    load_bundle,
    load_frozen,
    new_model,
    parameters,
    save_bundle,
    save_frozen,
    stacked_parameters,
    trust,
)
from cityrag_jax.data.build import mine_city
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.data.writing import write_city
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.vae import VAEConfig, WanVAE

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = DiTConfig(
    dim=32,
    num_heads=2,
    num_layers=2,
    ffn_dim=48,
    in_channels=36,
    freq_dim=16,
    text_dim=8,
    text_len=2,
)
DESCRIPTIONS = {
    "transformer": describe(WanDiT, CONFIG),
    "vae": describe(WanVAE, VAEConfig(base_dim=4, num_res_blocks=1)),
}
COUNTS = [
    pytest.param(3, id="3"),
    pytest.param(50, id="50", marks=[pytest.mark.faults]),
]
# Orbax leaves its other reads running when one fails, in a loop that it then closes.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def make_model(folder):
    modules = {name: new_model(told, 1) for name, told in DESCRIPTIONS.items()}
    text = np.ones((2, 8), np.float32)
    save_bundle(folder / "model", Bundle(modules, DESCRIPTIONS, text))


def read_model(folder):
    bundle = latest_model(folder)
    return [bundle.text, *(parameters(m) for m in bundle.modules.values())]


def make_base(folder):
    """What a training leaves as it is: the autoencoder, and half of the transformer."""
    vae = new_model(DESCRIPTIONS["vae"], 1)
    save_bundle(folder / "base", Bundle({"vae": vae}, DESCRIPTIONS))
    save_frozen(folder, frozen_of(), stacked_parameters(transformer()))


@functools.cache
def transformer():
    return new_model(DESCRIPTIONS["transformer"], 1)


def frozen_of():
    values = parameters(transformer())
    return {name: x for name, x in values.items() if "blocks.ffn" in name}


def read_base(folder):
    bundle = load_bundle(folder / "base")
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in frozen_of().items()
    }
    frozen = load_frozen(folder, shapes, stacked_parameters(transformer()))
    return [parameters(bundle.modules["vae"]), frozen]


def groups_of():
    values = parameters(transformer())
    return {
        "params": values,
        "ema": {name: x / 2 for name, x in values.items()},
        "optimizer": {"momentum": {name: x * 2 for name, x in values.items()}},
        "step": {"step": jnp.arange(3)},
    }


def make_checkpoint(folder):
    with TrainingCheckpoints(folder, writable=True) as checkpoints:
        stacked = stacked_parameters(transformer())
        checkpoints.save(7, groups_of(), {"part": "transformer"}, stacked)


def read_checkpoint(folder):
    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    wanted = jax.tree.map(shape, groups_of())
    with TrainingCheckpoints(folder) as checkpoints:
        stacked = stacked_parameters(transformer())
        return checkpoints.restore(wanted, stacked, step=7)


def make_city(folder, captures=12, num_frames=5):
    places = (0, 1, 200, 201)
    drives = [synthetic_city.line((0, y, 2), 90, captures) for y in places]
    poses = [pose for drive in drives for pose in drive]
    pictures = (synthetic_city.direction_panorama(pose, 128) for pose in poses)
    columns = synthetic_city.columns(drives, neighbourhoods=[0, 0, 1, 1])
    header = dataclasses.replace(synthetic_city.header(), generator={"toy_city": {}})
    write_city(folder / "city", header, columns, pictures)
    mine_city(folder / "city", num_frames=num_frames, held_out_fraction=0.5)


def read_city(folder):
    city = City(folder / "city")
    pictures = [city.panorama(i) for i in range(len(city))]
    pairs = dataclasses.asdict(load_pairs(folder / "city"))
    return [vars(city.captures), pairs, pictures, json.dumps(vars(city.header))]


KINDS = {
    "model": (make_model, read_model),
    "base": (make_base, read_base),
    "checkpoint": (make_checkpoint, read_checkpoint),
    "city": (make_city, read_city),
}
WORDS = str | int | None


def bits_of(tree) -> list:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, np.ndarray))
    return [x if isinstance(x, WORDS) else np.asarray(x).tobytes() for x in leaves]


def flip(file, position, bit):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    KINDS[request.param][0](made)
    return request.param, made


@pytest.mark.parametrize("count", COUNTS)
def test_flipped_bits_are_found_wherever_they_are(folder, count):
    kind, place = folder
    read = KINDS[kind][1]
    whole = bits_of(read(place))
    files = sorted(f for f in place.rglob("*") if f.is_file() and f.stat().st_size)
    sizes = np.array([f.stat().st_size for f in files], float)
    # Half of the flips anywhere, half in a file drawn first: small ones count, too.
    rng = np.random.default_rng(count)
    found, harmless = 0, []
    while found < count:
        weights = sizes / sizes.sum() if rng.random() < 0.5 else None
        file = files[rng.choice(len(files), p=weights)]
        position, bit = int(rng.integers(file.stat().st_size)), int(rng.integers(8))
        flip(file, position, bit)
        where = f"{file.relative_to(place)}, byte {position}, bit {bit}"
        try:
            assert bits_of(read(place)) == whole, f"silently another value: {where}"
            harmless.append(where)
        except ValueError as error:
            assert str(place) in str(error), f"{where}: {error}"
            assert "damage" in str(error) or "readable" in str(error), (where, error)
            found += 1
        finally:
            flip(file, position, bit)
        assert len(harmless) < 3 * count, harmless
    assert bits_of(read(place)) == whole


def test_a_missing_digest_is_damage(tmp_path):
    make_model(tmp_path)
    digests = tmp_path / "model" / "vae" / "digests.json"
    told = json.loads(digests.read_text())
    name = next(iter(told["rest"]))
    del told["rest"][name]
    text = digests.read_text()
    digests.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"checksum of 1 of .*rest/{name}"):
        read_model(tmp_path)
    digests.unlink()
    with pytest.raises(ValueError, match="digests.json does not exist"):
        read_model(tmp_path)
    digests.write_text(text)
    config = tmp_path / "model" / "config.json"
    told = json.loads(config.read_text())
    del told["digest"]
    config.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="its checksum is missing"):
        read_model(tmp_path)


def test_a_part_that_is_gone_is_named_instead_of_all_its_arrays(tmp_path):
    make_model(tmp_path)
    shutil.rmtree(tmp_path / "model" / "vae" / "rest")
    with pytest.raises(ValueError, match="vae/rest is missing, which .*digests.json"):
        read_model(tmp_path)


def test_trusted_disks_are_read_as_they_are(tmp_path):
    make_model(tmp_path)
    whole = bits_of(read_model(tmp_path))
    for file in (tmp_path / "model").rglob("digests.json"):
        file.unlink()
    trust()
    try:
        assert bits_of(read_model(tmp_path)) == whole
    finally:
        trust(False)
    with pytest.raises(ValueError, match="digests.json"):
        read_model(tmp_path)


@pytest.mark.long
def test_a_door_makes_nothing_of_damaged_weights(tmp_path):
    """The shipped autoencoder, one bit of its largest file: once a black video."""
    shutil.copytree(ROOT / "configs" / "toy_city_weights", tmp_path / "weights")
    files = (tmp_path / "weights" / "vae").rglob("d/*")
    flip(max(files, key=lambda file: file.stat().st_size), 500_000, 6)
    make_city(tmp_path, captures=45, num_frames=33)
    words = ["--config=configs/toy_city.py", "--config.eval.table_clips=2"]
    words += ["--config.eval.batch_size=2", f"--checkpoint={tmp_path / 'weights'}"]
    words += [f"--city={tmp_path / 'city'}", f"--out={tmp_path / 'out'}"]
    ended = subprocess.run(
        [sys.executable, "-m", "cityrag_jax.evaluate", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert "weights/vae is damaged" in ended.stderr and "arrays" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out" / "table.md").exists()
