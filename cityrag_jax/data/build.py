"""Mine the pairs of a city on disk, by limits that are scaled to a clip's length."""

import dataclasses
from pathlib import Path

from cityrag_jax.data.columns import captures_digest, write_columns
from cityrag_jax.data.mining import choose_held_out, mine_pairs
from cityrag_jax.data.pairs import PairConfig, Pairs, save_pairs
from cityrag_jax.data.remote import refuse_remote
from cityrag_jax.data.store import City
from cityrag_jax.geo.districts import number_districts
from cityrag_jax.geo.ecef import geodetic_from_ecef

BUFFER_M = 100.0
TOY_LIMITS = {"buffer_m": 0.0, "every_pass": False}


def mine_city(
    folder: str | Path,
    num_frames: int = 73,
    held_out_fraction: float = 0.1,
    *,
    districts: Path | None = None,
    **limits: float | int | tuple[int, ...],
) -> Pairs:
    """Mine the pairs of a city on disk, again or for the first time.

    `districts` are polygons, which give captures their neighbourhoods from now on.
    `limits` are those of `PairConfig`. Training keeps `BUFFER_M` away from what is held
    out, but in toy cities, whose neighbourhoods lie apart.
    """
    opened = City(folder)
    refuse_remote(opened.folder)
    if districts is not None:
        opened = set_districts(opened, districts)
    elif captures_digest(opened.folder) is None:  # another program wrote the columns
        write_columns(opened.folder, opened.header, opened.captures, opened.provenance)
    is_toy = "toy_city" in opened.header.generator
    limits = {**(TOY_LIMITS if is_toy else {"buffer_m": BUFFER_M}), **limits}
    config = pair_config(num_frames, held_out_fraction, **limits)
    chosen = choose_held_out(opened.captures.neighbourhood, opened.name, config)
    config = dataclasses.replace(config, held_out=tuple(chosen.tolist()))
    pairs = mine_pairs(opened.captures, opened.name, config)
    save_pairs(opened.folder, pairs, config)
    return pairs


def set_districts(city: City, path: Path) -> City:
    """Let the neighbourhoods of a city on disk be the districts of a GeoJSON file."""
    ecef = city.captures.ecef_from_camera[:, :3, 3]
    latitude_deg, longitude_deg, _ = geodetic_from_ecef(ecef)
    text = path.read_text(encoding="utf-8-sig")
    numbers = number_districts(text, path.name, latitude_deg, longitude_deg)
    captures = dataclasses.replace(city.captures, neighbourhood=numbers)
    write_columns(city.folder, city.header, captures, city.provenance)
    return City(city.folder)


def pair_config(
    num_frames: int,
    held_out_fraction: float,
    **limits: float | int | tuple[int, ...],
) -> PairConfig:
    """Scale the paper's 73 frames and 61 condition frames to another length."""
    kinds = {
        "min_condition": round(num_frames * 61 / 73),
        "stride": max(1, round(num_frames * 8 / 73)),
        "held_out_fraction": held_out_fraction,
    }
    return PairConfig(num_frames=num_frames, **{**kinds, **limits})
