"""Path files laid on a city's streets, as camera poses."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64

from cityrag_jax.data.store import City
from cityrag_jax.geo.matching import fill_heights
from cityrag_jax.geo.path_files import parse_path
from cityrag_jax.geo.trajectory import poses_on_earth


def read_path(
    path: Path | str, city: City, spacing_m: float
) -> Float64[np.ndarray, "N 4 4"]:
    """Read a path file as camera poses on Earth, one every `spacing_m`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a GeoJSON or CSV path.")
    places = fill_heights(city.index, parse_path(path.read_text(), path.name))
    return poses_on_earth(places, spacing_m)
