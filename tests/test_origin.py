"""A model, a config and a city that do not belong together are refused at once."""

import dataclasses
import json
import pathlib

import pytest
import synthetic_city

from cityrag_jax.checkpoint import Bundle, load_bundle
from cityrag_jax.commands import load_config
from cityrag_jax.data.store import City
from cityrag_jax.training.origin import check_cities, check_model, trained_on
from cityrag_jax.training.tasks import describe_model

ROOT = pathlib.Path(__file__).parents[1]
WEIGHTS = ROOT / "configs" / "toy_city_weights"


def config_of(name, **data):
    config = load_config(str(ROOT / "configs" / name)).unlock()
    config.data.update(data)
    return config


class Told(City):
    """A city of which only the header is known."""

    def __init__(self, header):
        self.header, self.folder = header, pathlib.Path("cities", header.name)


def city_of(name, **generator):
    return Told(dataclasses.replace(synthetic_city.header(name), generator=generator))


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return load_bundle(WEIGHTS)


@pytest.mark.parametrize("variant", ["gpu", "demo"])
def test_the_shipped_weights_fit_their_config_and_toy_cities(shipped, variant):
    check_model(config_of(f"toy_city.py:{variant}"), shipped)
    check_cities(shipped, [city_of("sydney", toy_city={})])


@pytest.mark.parametrize(
    "name", ["cityrag_14b.py", "cityrag_1_3b.py", "toy_city.py:test"]
)
def test_the_config_of_another_network_is_refused(shipped, name):
    """Once it went off to generate 73 frames of 832x480 with toy weights."""
    with pytest.raises(ValueError, match="does not fit") as error:
        check_model(config_of(name), shipped)
    assert "model.transformer.dim: " in str(error.value)
    assert "384 in the model" in str(error.value)
    assert "data.height: " in str(error.value) and "96 when it was" in str(error.value)


def test_a_model_written_today_fits_its_config():
    """Its description went through JSON, which knows no tuples."""
    config = config_of("toy_city.py")
    told = json.loads(json.dumps(describe_model(config)))
    assert told["config"]["patch"] == [2, 1]
    check_model(config, Bundle({}, {"transformer": told}, None))
    config.model.transformer.patch = (2, 2)
    with pytest.raises(ValueError, match=r"patch: \(2, 2\) in the config, \(2, 1\) in"):
        check_model(config, Bundle({}, {"transformer": told}, None))


def test_clips_of_another_size_are_refused_and_arithmetic_is_free(shipped):
    config = config_of("toy_city.py", num_frames=37)
    with pytest.raises(ValueError, match="data.num_frames: 37 in the config, 33 when"):
        check_model(config, shipped)
    config = config_of("toy_city.py")
    config.model.transformer.update(dtype="float32", remat=True)
    check_model(config, shipped)


def test_a_converted_model_fits_clips_of_any_size(shipped):
    check_model(
        config_of("toy_city.py", height=480), dataclasses.replace(shipped, source={})
    )


def test_a_city_of_another_kind_is_refused(shipped):
    with pytest.raises(
        ValueError, match="captured city, but .* trained on toy"
    ) as error:
        check_cities(shipped, [city_of("sydney", toy_city={}), city_of("Munich")])
    assert "Munich" in str(error.value) and "tokyo" in str(error.value)
    check_cities(dataclasses.replace(shipped, source={}), [city_of("Munich")])


def test_what_a_training_keeps_is_what_the_checks_read(shipped):
    config = config_of("toy_city.py", height=64)
    kept = trained_on(config, [city_of("b"), city_of("a", toy_city={}), city_of("b")])
    bundle = dataclasses.replace(shipped, source=kept)
    check_model(config, bundle)
    check_cities(bundle, [city_of("c"), city_of("d", toy_city={})])
    assert kept["trained_on"]["cities"] == ["a", "b"]
