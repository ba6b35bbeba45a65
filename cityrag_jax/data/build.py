"""Build cities on disk: render the toy city into panoramas, then mine its pairs.

Rendering, JPEG encoding (threads) and writing go on together, and the city appears
under its name only when it is complete.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cityrag_jax.data.captures import Captures, CityHeader
from cityrag_jax.data.columns import captures_digest, write_columns
from cityrag_jax.data.pairs import (
    PairConfig,
    Pairs,
    choose_held_out,
    mine_pairs,
    save_pairs,
)
from cityrag_jax.data.store import City, write_city
from cityrag_jax.data.toy_city import CityConfig, Drive, city, drives
from cityrag_jax.data.toy_render import render_panoramas
from cityrag_jax.data.toy_trouble import Trouble, misbehave, record, wobble
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.progress import Progress

LICENCE = "CC0-1.0"
ATTRIBUTION = "rendered by cityrag_jax"
RENDER_AT_ONCE = 64
BUFFER_M = 100.0
TOY_LIMITS = {"buffer_m": 0.0, "every_pass": False}

# What `tools/build_city.py --preset` changes of a toy city's plan.
PRESETS = {
    "test": {
        **{"neighbourhoods": 2, "blocks": 1, "block_m": 36.0, "supersample": 1},
        **{"routes": 1, "route_streets": 1},
    },
    "demo": {"neighbourhoods": 1, "blocks": 2, "routes": 1},
    "gpu": {"neighbourhoods": 2, "blocks": 3},
}
HEIGHT, HEIGHTS = 512, {"test": 128}  # of panoramas, where none is asked for


def toy_config(name: str, preset: str, **changes) -> CityConfig:
    """Give a named toy city in one of the sizes of `PRESETS`; changes win."""
    if preset not in PRESETS:
        raise ValueError(f"Preset {preset!r} is unknown; take one of {list(PRESETS)}.")
    return city(name, **{**PRESETS[preset], **changes})


def build_toy_city(
    config: CityConfig,
    folder: str | Path,
    *,
    height: int = 512,
    num_frames: int = 33,
    held_out_fraction: float = 0.25,
    quality: int = 90,
    overwrite: bool = False,
    trouble: Trouble | None = None,
    **limits: float | int,
) -> City:
    """Render a toy city's panoramas, write them as a city, mine pairs of its drives.

    `held_out_fraction` of the neighbourhoods is kept for evaluation: 1.0 for a city
    never trained on; `limits` are other values of `PairConfig`. `trouble` makes it as
    wrong as real recordings are.
    """
    told = made = drives(config)
    anchor = (config.latitude_deg, config.longitude_deg, config.height_m)
    generator = {"toy_city": dataclasses.asdict(config), "jpeg_quality": quality}
    if trouble is not None:
        driven = misbehave(config, made, trouble)
        told = [record(config, drive, trouble) for drive in driven]
        made = [wobble(config, drive, trouble) for drive in driven]
        generator["trouble"] = dataclasses.asdict(trouble)
    header = CityHeader(
        config.name, height, anchor, (LICENCE,), (ATTRIBUTION,), generator
    )
    captures = columns_of(told, anchor)
    # Before the long part: a city without pairs is of no use.
    limits = {**TOY_LIMITS, **limits}
    rules = pair_config(num_frames, held_out_fraction, **limits)
    pairs = mine_pairs(captures, config.name, rules)
    with Progress(f"rendering {config.name}", len(captures), "pano") as bar:
        panoramas = functools.partial(_render, config, made, height, bar)
        written = write_city(
            folder, header, captures, panoramas, quality=quality, overwrite=overwrite
        )
    save_pairs(written.folder, pairs)
    return written


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


def columns_of(made: list[Drive], anchor: tuple[float, float, float]) -> Captures:
    """Join drives into the columns of a city, placed on Earth."""
    lengths = [len(drive.time_s) for drive in made]
    enu_from_camera = np.concatenate([drive.enu_from_camera for drive in made])
    total = len(enu_from_camera)

    def repeated(name: str) -> np.ndarray:
        values = np.array([getattr(drive, name) for drive in made], np.int32)
        return np.repeat(values, lengths)

    return Captures(
        ecef_from_camera=ecef_from_enu(*anchor) @ enu_from_camera.astype(np.float64),
        time_s=np.concatenate([d.time_s for d in made]).astype(np.float64),
        drive=repeated("index"),
        neighbourhood=repeated("neighbourhood"),
        licence=np.zeros(total, np.int32),
        attribution=np.zeros(total, np.int32),
        anonymised=np.ones(total, bool),
    )


def _render(
    config: CityConfig, made: list[Drive], height: int, bar: Progress, start: int
) -> Iterator[UInt8[np.ndarray, "P W 3"]]:
    """Render the panoramas of drives from one of them on."""
    bar.update(start)
    for drive in made:
        skipped = min(start, len(drive.time_s))
        start -= skipped
        for first in range(skipped, len(drive.time_s), RENDER_AT_ONCE):
            part = slice(first, first + RENDER_AT_ONCE)
            poses, times_s = drive.enu_from_camera[part], drive.time_s[part]
            pictures = render_panoramas(config, drive.scene, poses, times_s, height)
            for picture in pictures.rgb:
                yield picture
                bar.update()
