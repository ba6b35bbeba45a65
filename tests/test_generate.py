"""The door to generation: photos, paths, what is refused and what is written."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import synthetic_city as synthetic
import training_city
from test_train import get_config

from cityrag_jax import request as requests
from cityrag_jax.checkpoint import Bundle
from cityrag_jax.data.paths import read_path
from cityrag_jax.data.store import City
from cityrag_jax.generator import with_text
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.request import (
    Order,
    Request,
    doubt_speed,
    fit_photo,
    generate,
    generate_into,
    read_poses,
    read_text,
)


@pytest.fixture(scope="module")
def city(tmp_path_factory) -> City:
    """Two drives north of 20 m, 1.5 m apart."""
    drives = [synthetic.line([0, 0, 2], 0, 40), synthetic.line([1.5, -1, 2], 0, 40)]
    return synthetic.build(tmp_path_factory.mktemp("generate") / "city", drives)


@pytest.fixture
def poses() -> np.ndarray:
    enu = synthetic.line([0.5, 1, 2], 0, 17, 0.75)
    return ecef_from_enu(*synthetic.ANCHOR) @ enu


@pytest.mark.parametrize("size", ((96, 144), (300, 144), (96, 500), (20, 24), (3, 90)))
def test_the_middle_of_a_photo_is_fitted(size):
    """A photo red in its middle column and row stays so at any size."""
    photo = np.zeros((*size, 3), np.uint8)
    photo[..., 0] = 255 - np.abs(np.linspace(-200, 200, size[1]))[None]
    fitted = fit_photo(photo, 32, 48)
    assert fitted.shape == (32, 48, 3)
    np.testing.assert_array_equal(fitted, np.clip(fitted, 0, 255))
    assert np.abs(np.argmax(fitted[16, :, 0]) - 23.5) <= 3
    assert not fitted[..., 1:].any()


def test_a_photo_of_a_few_pixels_is_refused_instead_of_making_fog():
    with pytest.raises(ValueError, match="has 1x1 pixels, .*48x32: give .*least 3x2,"):
        fit_photo(np.zeros((1, 1, 3), np.uint8), 32, 48)


def test_a_photo_of_the_wanted_size_is_itself(rng):
    photo = rng.integers(256, size=(32, 48, 3)).astype(np.uint8)
    np.testing.assert_array_equal(fit_photo(photo, 32, 48), photo)


def test_shrinking_takes_means_over_areas(rng):
    photo = rng.integers(256, size=(64, 96, 3)).astype(np.uint8)
    means = photo.reshape(32, 2, 48, 2, 3).mean((1, 3))
    np.testing.assert_allclose(fit_photo(photo, 32, 48), means, atol=0.51)


@pytest.mark.parametrize("kind", ("csv", "geojson"))
def test_a_drawn_path_becomes_poses_at_camera_height(city, tmp_path, kind):
    """Heights come from the captures, 2 m over the anchor; 2 mm of curvature remain."""
    enu = synthetic.line([0.5, 0.25, 2], 0, 26, 0.75)
    poses = ecef_from_enu(*synthetic.ANCHOR) @ enu
    ends = poses[[0, -1], :3, 3]
    ends[1] += 0.3 * poses[-1, :3, 2]  # less than a step farther
    latitude, longitude, _ = geodetic_from_ecef(ends)
    file = tmp_path / f"path.{kind}"
    if kind == "csv":
        rows = zip(latitude, longitude, strict=True)
        file.write_text("lat,lon\n" + "".join(f"{a:.10f},{b:.10f}\n" for a, b in rows))
    else:
        line = np.stack([longitude, latitude], -1).tolist()
        file.write_text(json.dumps({"type": "LineString", "coordinates": line}))
    read = read_path(file, city, 0.75)
    np.testing.assert_allclose(read, poses, atol=2e-3)


def test_paths_that_cannot_be_read_are_named(city, tmp_path):
    with pytest.raises(ValueError, match="no.csv does not exist; give a path as .geo"):
        read_path(tmp_path / "no.csv", city, 0.75)
    (tmp_path / "path.shp").write_text("<kml/>")
    with pytest.raises(ValueError, match="not from .shp"):
        read_path(tmp_path / "path.shp", city, 0.75)
    (tmp_path / "latin.csv").write_bytes("straße\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv is not text.*save it as UTF-8"):
        read_path(tmp_path / "latin.csv", city, 0.75)
    (tmp_path / "swapped.csv").write_text("11.5,148.1\n148.2,11.5\n")
    with pytest.raises(ValueError, match="point 2 has latitude 148.2"):
        read_path(tmp_path / "swapped.csv", city, 0.75)


def test_what_cannot_be_generated_is_refused_before_a_model_is_read(
    city, poses, tmp_path, monkeypatch
):
    config = get_config("toy_city")
    photo = np.zeros((64, 96, 3), np.uint8)
    wanted = Request(config, tmp_path, city, photo, poses)

    def never(*_, **__):
        raise AssertionError("a model was read")

    far = poses.copy()
    far[:, :3, 3] += 1000.0
    with monkeypatch.context() as patch:
        patch.setattr(requests, "open_generator", never)
        for message, change in {
            "without=depth: choose of": dict(without=("depth",)),
            "clip 0 of the path": dict(ecef_from_camera=far),
        }.items():
            with pytest.raises(ValueError, match=message):
                generate(dataclasses.replace(wanted, **change))
    with pytest.raises(ValueError, match="holds no model"):
        generate(wanted)
    with pytest.raises(ValueError, match="holds no model"):
        generate_into(tmp_path / "out", wanted)


def test_another_prompt_takes_the_place_of_the_stored_one(tmp_path, rng):
    told = {"transformer": {"config": {"text_len": 4, "text_dim": 3}}}
    bundle = Bundle({}, told, np.zeros((1, 3), np.float32), "model")
    rows = rng.normal(size=(2, 3)).astype(np.float32)
    np.save(tmp_path / "text.npy", rows)
    changed = with_text(bundle, read_text(tmp_path / "text.npy"))
    np.testing.assert_array_equal(changed.text, rows)
    for shape in ((5, 3), (2, 4)):
        with pytest.raises(ValueError, match="model takes at most 4 of 3"):
            with_text(bundle, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="model has no transformer"):
        with_text(dataclasses.replace(bundle, descriptions={}), rows)


def test_what_is_no_prompt_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.npy cannot be read"):
        read_text(tmp_path / "none.npy")
    for content in ("", "a street"):
        (tmp_path / "bad.npy").write_text(content)
        with pytest.raises(ValueError, match="bad.npy cannot be read"):
            read_text(tmp_path / "bad.npy")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(ValueError, match="holds float64 of"):
        read_text(tmp_path / "flat.npy")


def test_the_command_line_ends_in_one_line_of_error(tmp_path):
    config = training_city.ROOT / "configs" / "toy_city.py"
    given = dict(config=config, checkpoint="x", city=tmp_path, image="x", path="x")
    command = [sys.executable, "-m", "cityrag_jax.generate", f"--out={tmp_path}"]
    ended = subprocess.run(
        command + [f"--{name}={value}" for name, value in given.items()],
        cwd=training_city.ROOT,
        env=training_city.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: {tmp_path}")
    assert "Traceback" not in ended.stderr


def test_speed_and_stops_are_those_of_the_command_line(city, tmp_path):
    """At ten frames a second 5 m/s are half a metre; nobody drove 40 m/s here."""
    enu = synthetic.line([0.5, 1, 2], 0, 2, 12.1)
    ends = (ecef_from_enu(*synthetic.ANCHOR) @ enu)[:, :3, 3]
    rows = zip(*geodetic_from_ecef(ends), strict=True)
    file = tmp_path / "path.csv"
    file.write_text("".join(f"{a:.10f},{b:.10f},{h:.4f}\n" for a, b, h in rows))
    sample, order = get_config("toy_city").sample, Order("photo.png", str(file))
    slow = dataclasses.replace(order, speed_m_s=5.0, stops="4:1.5,10:0.3")
    poses = read_poses(slow, city, sample)
    assert len(poses) == 25 + 15 + 3
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    np.testing.assert_array_equal(
        np.flatnonzero(steps == 0), [*range(8, 23), 35, 36, 37]
    )
    np.testing.assert_allclose(steps[steps > 0], 0.5, atol=1e-3)
    assert doubt_speed(slow, city, sample) == ""
    fast = dataclasses.replace(order, speed_m_s=40.0)
    assert len(read_poses(fast, city, sample)) == 4
    doubt = doubt_speed(fast, city, sample)
    assert "4.00 m between frames (40.0 m/s); drives" in doubt
    with pytest.raises(ValueError, match="--stops=4: write metres:seconds"):
        read_poses(dataclasses.replace(fast, stops="4"), city, sample)
    with pytest.raises(ValueError, match="speed-m-s=0: give metres a second above"):
        read_poses(dataclasses.replace(fast, speed_m_s=0.0), city, sample)
    with pytest.raises(ValueError, match="at most 3,600, and lie on the path"):
        read_poses(dataclasses.replace(fast, stops="4:1e9"), city, sample)
    for name, value in (("fps", 0.0), ("fps", np.nan), ("spacing_m", -1.0)):
        wrong = get_config("toy_city", **{f"sample__{name}": value}).sample
        with pytest.raises(ValueError, match=f"sample.{name} is .*; give one above 0"):
            read_poses(fast, city, wrong)


def test_a_path_in_words_is_that_of_a_file(city, tmp_path):
    latitude, longitude, _ = synthetic.ANCHOR
    words = f"start {latitude},{longitude} 0; forward 12; stop 1"
    (tmp_path / "path.txt").write_text(words)
    sample = get_config("toy_city").sample
    drawn = read_poses(Order("x", str(tmp_path / "path.txt")), city, sample)
    said = read_poses(Order("x", script=words), city, sample)
    np.testing.assert_array_equal(drawn, said)


def test_what_an_order_lacks_is_said_before_a_file_is_read():
    for order, message in (
        (Order("", "path.csv"), "An image is needed"),
        (Order("a.jpg"), "a path or a script, one of them; path is ''"),
        (Order("a.jpg", "path.csv", "start"), "one of them"),
        (Order("a.jpg", "path.csv", seed=-1), "Seed -1 must be from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            order.check()
