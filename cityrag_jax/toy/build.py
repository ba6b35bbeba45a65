"""Build the toy city on disk: render it into panoramas, then mine its pairs.

Rendering, JPEG encoding (threads) and writing go on together, and the city appears
under its name only when it is complete.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cityrag_jax.data.build import TOY_LIMITS, pair_config
from cityrag_jax.data.captures import Captures, CityHeader
from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.data.pairs import save_pairs
from cityrag_jax.data.store import City
from cityrag_jax.data.writing import Writing, write_city
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.progress import Progress
from cityrag_jax.toy.drives import CityConfig, Drive, city, drives
from cityrag_jax.toy.render import render_panoramas
from cityrag_jax.toy.trouble import Trouble, misbehave, record, wobble

LICENCE = "CC0-1.0"
ATTRIBUTION = "rendered by cityrag_jax"
RENDER_AT_ONCE = 64

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
        how = Writing(quality, overwrite=overwrite)
        written = write_city(folder, header, captures, panoramas, how=how)
    save_pairs(written.folder, pairs)
    return written


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
    config: CityConfig,
    made: list[Drive],
    height: int,
    bar: Progress,
    first: int,
    stop: int,
) -> Iterator[UInt8[np.ndarray, "P W 3"]]:
    """Render the panoramas of drives from one of them on up to another."""
    bar.reach(first)
    begin = 0
    for drive in made:
        end = begin + len(drive.time_s)
        for at in range(max(first, begin), min(stop, end), RENDER_AT_ONCE):
            part = slice(at - begin, min(at + RENDER_AT_ONCE, stop, end) - begin)
            poses, times_s = drive.enu_from_camera[part], drive.time_s[part]
            pictures = render_panoramas(config, drive.scene, poses, times_s, height)
            for picture in pictures.rgb:
                yield picture
                bar.update()
        begin = end
