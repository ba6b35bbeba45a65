"""What a model was trained on, kept with it; what does not belong together is refused.

A config, a model and a city may each be whole and yet not fit: a model then computes
noise without a word. Both checks read descriptions alone and come before any weight.
"""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from cityrag_jax.checkpoint import Bundle, read_config
from cityrag_jax.data.store import City
from cityrag_jax.training.tasks import describe_model

# What a clip is: another one is nothing that the model has seen.
SIZES = ("num_frames", "height", "width", "fov_deg")
TRAINED_ON = "trained_on"  # a key of a bundle's `source`
# Of a transformer's config, what is no choice of arithmetic or memory.
ARITHMETIC = {"dtype", "param_dtype", "remat", "keep", "offload", "unroll"}


def trained_on(config: ConfigDict, cities: Iterable[City]) -> dict[str, Any]:
    """Say what a training shows its model, as plain JSON for a bundle's `source`."""
    cities = list(cities)
    return {
        TRAINED_ON: {
            "sizes": {name: config.data[name] for name in SIZES},
            "cities": sorted({city.name for city in cities}),
            "kinds": sorted({kind_of(city) for city in cities}),
        }
    }


def kind_of(city: City) -> str:
    """Say if a city was drawn or filmed."""
    return "toy" if "toy_city" in city.header.generator else "captured"


def check_model(config: ConfigDict, bundle: Bundle) -> None:
    """Raise ValueError if the config describes another network or other clips.

    A converted model that was never trained here fits clips of any size.
    """
    lines = _other_sizes(config, bundle) + _other_clips(config, bundle)
    if lines:
        raise ValueError(
            f"The config does not fit {bundle.origin}:\n  "
            + "\n  ".join(lines)
            + "\nGive the --config that it was trained with."
        )


def check_cities(bundle: Bundle, cities: Iterable[City]) -> None:
    """Raise ValueError if a model has never seen a city of that kind."""
    kinds = bundle.source.get(TRAINED_ON, {}).get("kinds")
    for city in cities:
        if kinds and kind_of(city) not in kinds:
            seen = ", ".join(bundle.source[TRAINED_ON]["cities"])
            raise ValueError(
                f"{city.folder} ({city.name}) is a {kind_of(city)} city, but "
                f"{bundle.origin} was trained on {' and '.join(kinds)} ones ({seen}); "
                "its videos would mean nothing. Train on such a city first."
            )


def _other_sizes(config: ConfigDict, bundle: Bundle) -> list[str]:
    told = bundle.descriptions.get("transformer")
    if told is None or config.task != "CityRAG":
        return []
    wanted, found = read_config(describe_model(config)), read_config(told)
    values = {
        name: (getattr(wanted, name), getattr(found, name))
        for name in sorted(told["config"].keys() - ARITHMETIC)
    }
    return [
        f"model.transformer.{name}: {ours!r} in the config, {theirs!r} in the model"
        for name, (ours, theirs) in values.items()
        if ours != theirs
    ]


def _other_clips(config: ConfigDict, bundle: Bundle) -> list[str]:
    sizes = bundle.source.get(TRAINED_ON, {}).get("sizes", {})
    return [
        f"data.{name}: {config.data[name]!r} in the config, {x!r} when it was trained"
        for name, x in sizes.items()
        if config.data[name] != x
    ]
