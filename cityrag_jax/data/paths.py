"""Path files laid on a city's streets, as camera poses."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64

from cityrag_jax.data.store import City
from cityrag_jax.geo.matching import fill_heights
from cityrag_jax.geo.path_files import SUFFIXES, parse_path
from cityrag_jax.geo.trajectory import poses_on_earth


def read_path(
    path: Path | str, city: City, spacing_m: float
) -> Float64[np.ndarray, "N 4 4"]:
    """Read a path file as camera poses on Earth, one every `spacing_m`."""
    path = Path(path)
    places = fill_heights(city.index, parse_path(read_words(path), path.name))
    return poses_on_earth(places, spacing_m)


def read_words(path: Path) -> str:
    """Read a text file in UTF-8 or, as Excel may write it, UTF-16 with its mark."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; give a path as .{', .'.join(SUFFIXES)}."
        )
    content = path.read_bytes()
    code = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(code)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); save it as UTF-8.") from error
