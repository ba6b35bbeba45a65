"""Build a city on disk, or mine the pairs of one again.

    python tools/build_city.py --source=folder --from=DIR --out=DIR \\
        --licence=CC-BY-4.0 --attribution="who took them"
    python tools/build_city.py --source=video --from=FILE.mp4 --poses=TRACK.gpx ...
    python tools/build_city.py --source=panoramax --bbox=W,S,E,N --out=DIR
    MAPILLARY_ACCESS_TOKEN=... python tools/build_city.py --source=mapillary --bbox=...
    python tools/build_city.py --toy=paris --out=DIR [--preset=gpu] [--height=512]
    python tools/build_city.py --mine=DIR [--num-frames=73]

A folder holds equirectangular pictures with EXIF GPS and, if known, GPano's heading,
pitch and roll; --poses gives them otherwise. Of a video (or a folder of them) frames
are taken by distance along the track; when it began is found by speed, or
--clock-offset-s says how far its clock is off. Services are asked once: what they list
and their pictures are kept in --from, by default beside the city. Killed, the same
command goes on. With --append what the city at --out does not hold is added to it: its
files stay, its spacing is kept, pairs are mined again with the limits that they were
mined with, and what was held out stays so; until all is done the city is as it was. Toy
cities are rendered; sizes of their plan given one by one override the preset.
"""

import argparse
import functools
import os
from pathlib import Path

from cityrag_jax.commands import Command
from cityrag_jax.data.beam import by_beam, open_pipeline
from cityrag_jax.data.build import mine_city
from cityrag_jax.data.pairs import PAIRS, load_pairs, read_rules
from cityrag_jax.data.shards import Spread, in_processes
from cityrag_jax.data.store import City
from cityrag_jax.importers.cities import Making, describe_import, keep_spacing
from cityrag_jax.importers.film import Source as Film
from cityrag_jax.importers.film import import_film
from cityrag_jax.importers.folder import Source, import_folder
from cityrag_jax.importers.mapillary import GROUPS
from cityrag_jax.importers.recordings import HEADINGS, Cuts, Origin
from cityrag_jax.importers.services import SERVICES, import_service, open_service
from cityrag_jax.importers.web import Client
from cityrag_jax.parallel import keep_compilations
from cityrag_jax.toy import build
from cityrag_jax.toy.drives import ANCHORS
from cityrag_jax.toy.trouble import read_trouble

PLAN = {
    "neighbourhoods": "of the city: of a toy along a side, else in all",
    "blocks": "of houses of a neighbourhood, along a side",
    "routes": "that are driven in a neighbourhood",
    "route_streets": "streets of a route",
    "drives_per_route": "at different times",
    "seed": "of all that is drawn",
}
# Of pairs, as data/pairs.py says; what is not given is as there.
LIMITS = {
    "max_mean_distance_m": "of a pair's drives",
    "min_gap_s": "between a pair's drives",
    "max_turn_deg": "between a pair's courses",
    "max_step_m": "between captures of a clip",
    "max_back_m": "by which a drive may go back, as noise does",
    "max_offset_m": "in height between two drives throughout",
    "max_height_m": "in height beside that",
    "buffer_m": "between training and what is held out; toy 0, else 100",
}

COUNTS = ("num_frames", "held_out_fraction", "held_out", "stride", "min_condition")


def read_numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers, separated by commas."""
    return tuple(map(int, text.split(",")))


COMMAND = Command(__doc__)
COMMAND.takes(
    "--source",
    choices=["folder", "video", *SERVICES],
    help="import pictures from there",
)
COMMAND.takes("--from", dest="origin", type=Path, help="folder of the pictures")
COMMAND.takes("--bbox", help="of a service: WEST,SOUTH,EAST,NORTH in degrees")
COMMAND.takes("--collection", help="of panoramax: ids of sequences, by commas")
COMMAND.takes("--api", help="of a service: its root, if not the public one")
COMMAND.takes(
    "--groups", choices=GROUPS, default=GROUPS[0], help="of mapillary: merge_cc"
)
COMMAND.takes("--toy", choices=sorted(ANCHORS), help="render this toy city")
COMMAND.takes("--mine", type=Path, help="mine pairs of this city on disk")
COMMAND.makes("--out", needed=False, type=Path, help="folder of the new city")
COMMAND.takes(
    "--height",
    type=int,
    help="of a panorama, pixels; else its own; toy 512, --preset=test 128",
)
COMMAND.takes("--num-frames", type=int, help="of a clip; toy 33, else 73")
COMMAND.takes("--held-out-fraction", type=float, help="toy 0.25, else 0.1")
COMMAND.takes("--stride", type=int, help="between windows that may be pairs, captures")
COMMAND.takes("--min-condition", type=int, help="captures left in a pair's other drive")
COMMAND.takes(
    "--held-out", type=read_numbers, help="neighbourhoods, by commas; else a fraction"
)
COMMAND.takes(
    "--districts", type=Path, help="GeoJSON polygons that are the neighbourhoods"
)
for name, meaning in LIMITS.items():
    COMMAND.takes(f"--{name.replace('_', '-')}", type=float, help=meaning)
COMMAND.takes("--workers", type=int, help="processes of an import, else one")
COMMAND.takes("--beam", metavar="OPTIONS", help="import by Apache Beam: its options")
COMMAND.takes("--quality", type=int, default=90, help="of the JPEG tiles")
COMMAND.switch("--append", "add what --out does not hold to the city there")
COMMAND.switch("--overwrite", "replace the city that stands at --out")
COMMAND.takes("--licence", help="of the pictures, as SPDX names it")
COMMAND.takes("--attribution", help="whom to name beside what is made of them")
COMMAND.switch("--anonymised", "people and plates cannot be recognised in them")
COMMAND.takes(
    "--blur-masks", type=Path, help="masks NAME.png, white on what is to be blurred"
)
COMMAND.takes(
    "--poses",
    type=Path,
    help="their places: .csv, .gpx, mapillary_tools' .json, COLMAP's images.txt, TUM",
)
COMMAND.takes("--anchor", help="LATITUDE,LONGITUDE,HEIGHT of local metres in --poses")
COMMAND.takes(
    "--clock-offset-s",
    type=float,
    help="added to the camera's times; of pictures 0, of videos found by speed",
)
COMMAND.takes(
    "--spacing-m", type=float, default=0.0, help="least between captures; 0 keeps all"
)
COMMAND.takes("--gap-s", type=float, default=Cuts.gap_s, help="longer ends a drive")
COMMAND.takes("--gap-m", type=float, default=Cuts.gap_m, help="farther ends a drive")
COMMAND.takes(
    "--headings", choices=HEADINGS, default=HEADINGS[0], help="the pictures', or course"
)
COMMAND.takes(
    "--mount-deg", type=float, help="of the camera right of the course; else found"
)
COMMAND.takes(
    "--declination-deg", type=float, default=0.0, help="added to magnetic headings"
)
COMMAND.takes("--trouble", help="of a toy: noise_m=0.3,drift_m=2,gaps=1,... or all")
COMMAND.takes(
    "--preset",
    choices=list(build.PRESETS),
    default="demo",
    help="size of a toy's plan; test is the smallest",
)
for name, meaning in PLAN.items():
    COMMAND.takes(f"--{name.replace('_', '-')}", type=int, help=meaning)


def main(given: argparse.Namespace) -> None:
    """Build a city or mine one, and say what came of it."""
    keep_compilations()
    spread = read_spread(given)
    if given.append and not given.source:
        raise ValueError("--append needs --source: toy cities are rendered whole.")
    if sum(way is not None for way in (given.toy, given.mine, given.source)) != 1:
        raise ValueError("Give one of --source=NAME, --toy=NAME and --mine=DIR.")
    limits = {
        name: getattr(given, name)
        for name in (*COUNTS, *LIMITS)
        if getattr(given, name) is not None
    }
    if given.districts and given.toy:
        raise ValueError("--districts needs --source or --mine: a toy has its own.")
    if given.mine:
        folder = given.mine
        mine_city(folder, districts=given.districts, **limits)
    elif given.out is None:
        raise ValueError("--toy and --source need --out=DIR.")
    else:
        make = functools.partial(build_from_pictures, spread=spread)
        city = (build_toy if given.toy else make)(given, limits)
        folder = city.folder
        print(f"{city.name}: {len(city)} panoramas in {folder}")
    if not (folder / PAIRS).exists():
        return
    pairs = load_pairs(folder)
    print(
        f"{folder}: {len(pairs.training)} pairs to train on, "
        f"{len(pairs.evaluation)} held out"
    )


def read_spread(given: argparse.Namespace) -> Spread:
    """Say who makes the files of an import."""
    if given.workers is None and given.beam is None:
        return map
    if not given.source or (given.workers is not None and given.beam is not None):
        raise ValueError(
            "--workers and --beam, one of them, share an import (--source); toy cities "
            "are rendered in one process."
        )
    if given.beam is not None:
        open_pipeline(given.beam)  # before anything takes time
        return functools.partial(by_beam, given.beam)
    if given.workers < 1:
        raise ValueError(f"--workers={given.workers}: give 1 or more.")
    return functools.partial(in_processes, given.workers) if given.workers > 1 else map


def build_from_pictures(
    given: argparse.Namespace, limits: dict, spread: Spread
) -> City:
    """Import pictures, and mine their pairs where there are any."""
    spacing_m = given.spacing_m
    if given.append:
        if given.overwrite or not given.out.exists():
            raise ValueError(
                f"--append adds to a city: {given.out} must be one, and stay."
            )
        limits = read_rules(given.out) | limits
        spacing_m = keep_spacing(given.out, spacing_m)
    cuts = Cuts(
        given.gap_s,
        given.gap_m,
        spacing_m,
        given.headings,
        given.mount_deg,
        given.declination_deg,
        given.neighbourhoods,
    )

    def finish(folder: Path) -> None:
        try:
            mine_city(folder, districts=given.districts, **limits)
        except ValueError as error:  # good for a video, though not for training
            print(f"  no pairs to train on: {error}")

    making = Making(
        given.out.name,
        given.height,
        given.quality,
        cuts,
        given.blur_masks,
        given.append,
        spread,
        max(1, (os.cpu_count() or 1) // (given.workers or 1)),
        finish,
    )
    bring = import_listed if given.source in SERVICES else import_owned
    city, report = bring(given, making)
    print(describe_import(report))
    return city


def import_owned(given: argparse.Namespace, making: Making) -> tuple[City, dict]:
    """Import pictures whose owner the user names."""
    for name in ("origin", "licence", "attribution"):
        if not getattr(given, name):
            option = "from" if name == "origin" else name
            raise ValueError(
                f"--source={given.source} needs --{option}: licence and attribution "
                "travel into every video that is made of the pictures."
            )
    origin = Origin(given.licence, given.attribution, given.anonymised)
    if given.source == "video":
        if given.poses is None:
            raise ValueError("--source=video needs --poses=TRACK.gpx, with times.")
        film = Film(given.origin, given.poses, origin, given.clock_offset_s)
        return import_film(film, making, given.out, overwrite=given.overwrite)
    clock_s, anchor = given.clock_offset_s or 0.0, read_anchor(given.anchor)
    source = Source(given.origin, origin, given.poses, clock_s, anchor)
    return import_folder(source, making, given.out, overwrite=given.overwrite)


def read_anchor(text: str | None) -> tuple[float, float, float] | None:
    """Read a place that local metres count from."""
    if text is None:
        return None
    try:
        latitude, longitude, height_m = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--anchor={text}: write LATITUDE,LONGITUDE,HEIGHT, such as 48.1,11.6,520."
        ) from None
    return latitude, longitude, height_m


def import_listed(given: argparse.Namespace, making: Making) -> tuple[City, dict]:
    """Import what a service has in an area; each picture tells its own licence."""
    client = Client()
    folder = given.origin or given.out.with_name(f"{given.out.name}.{given.source}")
    city, report = import_service(
        open_service(
            given.source,
            client,
            bbox=given.bbox,
            collection=given.collection,
            api=given.api,
            licence=given.licence,
            anonymised=given.anonymised,
        ),
        client,
        making,
        given.out,
        folder,
        aligned=given.groups == "aligned",
        overwrite=given.overwrite,
    )
    print(f"  {folder} keeps listing and pictures; it may be removed")
    return city, report


def build_toy(given: argparse.Namespace, limits: dict) -> City:
    """Render the toy city that is asked for."""
    changes = {n: getattr(given, n) for n in PLAN}
    changes = {n: value for n, value in changes.items() if value is not None}
    return build.build_toy_city(
        build.toy_config(given.toy, given.preset, **changes),
        given.out,
        height=build.HEIGHTS.get(given.preset, build.HEIGHT)
        if given.height is None
        else given.height,
        quality=given.quality,
        overwrite=given.overwrite,
        trouble=read_trouble(given.trouble),
        **limits,
    )


if __name__ == "__main__":
    COMMAND.run(main)
