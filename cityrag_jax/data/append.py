"""Add drives to a city that exists.

Its files of panoramas are linked, not written again, and new ones come behind them;
the city as it was stands under its name until the new one is whole. Captures keep their
ids and numbers.
"""

import dataclasses

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int32
from scipy.spatial import cKDTree

from cityrag_jax.data.captures import Captures, CityHeader
from cityrag_jax.data.provenance import Provenance
from cityrag_jax.data.store import City
from cityrag_jax.data.writing import Panoramas, Writing, write_city

JOINED_M = 200.0  # from a neighbourhood's captures; what lies farther makes new ones
SAME_S = 1.0  # a picture may tell its time in whole seconds


def append_city(
    city: City,
    header: CityHeader,
    captures: Captures,
    panoramas: Panoramas,
    *,
    provenance: Provenance,
    how: Writing | None = None,
) -> City:
    """Put captures, numbered from 0 as a city of their own, behind those of a city."""
    if header.panorama_height != city.header.panorama_height:
        raise ValueError(
            f"{city.folder}: its panoramas are {city.header.panorama_height} high, "
            f"those to append {header.panorama_height}; give the same --height."
        )
    joined, numbers = join_headers(city.header, header)
    old = city.captures
    added = dataclasses.replace(
        captures,
        drive=captures.drive + old.drive.max() + 1,
        neighbourhood=join_neighbourhoods(old, captures),
        licence=numbers["licences"][captures.licence],
        attribution=numbers["attributions"][captures.attribution],
    )
    names = [field.name for field in dataclasses.fields(Captures)]
    both = {n: np.concatenate([getattr(old, n), getattr(added, n)]) for n in names}
    arrays = {
        name: pa.concat_arrays([getattr(city.provenance, name), column])
        for name, column in vars(provenance).items()
    }
    return write_city(
        city.folder,
        joined,
        Captures(**both),
        panoramas,
        Provenance(**arrays),
        dataclasses.replace(how or Writing(), overwrite=True, before=city),
    )


def join_headers(
    old: CityHeader, new: CityHeader
) -> tuple[CityHeader, dict[str, Int32[np.ndarray, " _"]]]:
    """Give a city's header with what an addition brings, and the new words' numbers."""
    words, numbers = {}, {}
    for name in ("licences", "attributions"):
        words[name] = tuple(dict.fromkeys(getattr(old, name) + getattr(new, name)))
        places = [words[name].index(word) for word in getattr(new, name)]
        numbers[name] = np.array(places, np.int32)
    appended = [*old.generator.get("appended", []), new.generator]
    generator = old.generator | {"appended": appended}
    return dataclasses.replace(old, **words, generator=generator), numbers


def join_neighbourhoods(old: Captures, new: Captures) -> Int32[np.ndarray, " _"]:
    """Give the neighbourhoods of an addition: the nearest that is there, or new ones.

    A street that is held out stays so, whoever drives it next.
    """

    def places(captures: Captures) -> Float64[np.ndarray, "N 3"]:
        return captures.ecef_from_camera[:, :3, 3]

    tree = cKDTree(places(old), balanced_tree=False, compact_nodes=False)
    apart_m, nearest = tree.query(places(new), distance_upper_bound=JOINED_M)
    near = np.isfinite(apart_m)
    joined = new.neighbourhood + old.neighbourhood.max() + 1
    joined[near] = old.neighbourhood[nearest[near]]
    return joined.astype(np.int32)


def find_new(
    city: City, ids: list[str], time_s: Float64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Say which pictures a city does not hold yet.

    Raises ValueError for one that has the id of another: taken at another time.
    """
    known = dict(zip(city.provenance.id.to_pylist(), city.captures.time_s, strict=True))
    new = np.array([name not in known for name in ids], bool)
    for k in np.flatnonzero(~new).tolist():
        if abs(known[ids[k]] - time_s[k]) > SAME_S:
            raise ValueError(
                f"{city.folder} has a picture {ids[k]!r} taken at {known[ids[k]]:.1f} "
                f"s, this one was at {time_s[k]:.1f} s: give the folder above those of "
                "both recordings, or another name to the picture."
            )
    return new
