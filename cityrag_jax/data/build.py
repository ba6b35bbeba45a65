"""Mine the pairs of a city on disk, by limits that are scaled to a clip's length."""

import dataclasses
from pathlib import Path

from cityrag_jax.data.columns import captures_digest, write_columns
from cityrag_jax.data.pairs import (
    PairConfig,
    Pairs,
    choose_held_out,
    mine_pairs,
    save_pairs,
)
from cityrag_jax.data.store import City

BUFFER_M = 100.0
TOY_LIMITS = {"buffer_m": 0.0, "every_pass": False}


def mine_city(
    folder: str | Path,
    num_frames: int = 73,
    held_out_fraction: float = 0.1,
    **limits: float | int | tuple[int, ...],
) -> Pairs:
    """Mine the pairs of a city on disk, again or for the first time.

    `limits` are those of `PairConfig`. Training keeps `BUFFER_M` away from what is held
    out, but in toy cities, whose neighbourhoods lie apart.
    """
    opened = City(folder)
    if captures_digest(opened.folder) is None:  # another program wrote the columns
        parts = opened.header, opened.captures, opened.provenance
        write_columns(opened.folder, *parts)
    is_toy = "toy_city" in opened.header.generator
    limits = {**(TOY_LIMITS if is_toy else {"buffer_m": BUFFER_M}), **limits}
    config = pair_config(num_frames, held_out_fraction, **limits)
    chosen = choose_held_out(opened.captures.neighbourhood, opened.name, config)
    config = dataclasses.replace(config, held_out=tuple(chosen.tolist()))
    pairs = mine_pairs(opened.captures, opened.name, config)
    save_pairs(opened.folder, pairs, config)
    return pairs


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
