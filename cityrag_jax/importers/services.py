"""What a picture service has in an area becomes a city: listed, fetched, placed.

Three steps, each of which goes on where it was interrupted: the listing, the pictures
(`listing`), and the city (`cities`).
"""

import collections
import functools
from pathlib import Path
from typing import Any

import numpy as np

from cityrag_jax.data.store import City
from cityrag_jax.data.takedown import read_taken
from cityrag_jax.data.writing import check_free
from cityrag_jax.geo.path_files import format_lines
from cityrag_jax.geo.revisits import find_revisits, join_steps
from cityrag_jax.importers.cities import Making, Recording, make_city
from cityrag_jax.importers.folder import load_pictures, sphere_of
from cityrag_jax.importers.listing import (
    Item,
    Service,
    Skipped,
    fetch_pictures,
    list_items,
    read_box,
)
from cityrag_jax.importers.mapillary import API, align_groups, open_mapillary
from cityrag_jax.importers.panoramax import CATALOGUE, open_panoramax
from cityrag_jax.importers.recordings import COLUMNS, Cuts, Origin, Shots, cut_drives
from cityrag_jax.importers.tags import read_tags
from cityrag_jax.importers.web import Client

SERVICES = ("panoramax", "mapillary")


def open_service(
    name: str,
    client: Client,
    *,
    bbox: str | None,
    collection: str | None = None,
    api: str | None = None,
    licence: str | None = None,
    anonymised: bool = False,
) -> Service:
    """Give a service by its name, and the areas that are asked for."""
    box = read_box(bbox) if bbox else None
    if name == "mapillary":
        if box is None:
            raise ValueError("--source=mapillary needs --bbox=WEST,SOUTH,EAST,NORTH.")
        return open_mapillary(client, box, api=api or API)
    return open_panoramax(
        client,
        box=box,
        collections=tuple((collection or "").replace(",", " ").split()),
        api=api or CATALOGUE,
        licence=licence,
        anonymised=anonymised,
    )


def import_service(
    service: Service,
    client: Client,
    making: Making,
    out: Path,
    folder: Path,
    *,
    aligned: bool = True,
    overwrite: bool = False,
) -> tuple[City, dict[str, Any]]:
    """Write a city of all panoramas of a service; give it, and its import.json.

    `folder` keeps listing and pictures. `aligned` moves what was computed together to
    where its cameras say they were; else it stays where it was computed.
    """
    check_free(out, overwrite or making.append)
    items, skipped = list_items(service, folder)
    if not items:
        told = "; ".join(f"{len(names)} {why}" for why, names in skipped.items())
        raise ValueError(
            f"{service.question} gives no panorama that can be used ({told or 'none'})."
        )
    found, taken = len(items), read_taken(folder)
    if gone := [item.id for item in items if item.id in taken]:
        skipped["taken down"] = gone
        items = [item for item in items if item.id not in taken]
    items = fetch_pictures(items, service, client, folder, skipped)
    items, notes = align_groups(items) if aligned else (items, [])
    recording = record_items(
        service.question["service"], items, folder / "pictures", notes, skipped
    )
    city, report = make_city(recording, making, out, overwrite=overwrite)
    return city, report | {"listed": found, "fetched": len(items)}


def record_items(
    kind: str, items: list[Item], folder: Path, notes: list[str], skipped: Skipped
) -> Recording:
    """Make fetched items a recording."""
    kept, spheres = [], []
    for item in items:
        try:
            spheres.append(sphere_of(read_tags(folder / item.name)))
        except ValueError as error:
            reason = str(error).replace(f"{folder / item.name} ", "").rstrip(".")
            skipped.setdefault(reason, []).append(item.id)
        else:
            kept.append(item)
    if not kept:
        told = "; ".join(f"{len(names)} {why}" for why, names in skipped.items())
        raise ValueError(f"No picture in {folder} can be used ({told}).")
    load = functools.partial(load_pictures, folder)
    return Recording(kind, place_items(kept), spheres, load, notes, skipped)


def count_passes(
    items: list[Item], cuts: Cuts, gap_s: float
) -> tuple[dict[str, Any], str]:
    """Say what a listing holds before any picture is fetched, and draw its streets.

    The kilometres with passes at two times are those that pairs can be mined of; the
    lines, as GeoJSON, say at how many times each stretch was driven.
    """
    _, shots, place_m, drive = cut_drives(place_items(items), cuts)
    found = find_revisits(place_m, drive, shots.time_s, gap_s=gap_s)
    lines, known = [], []
    for times in np.unique(found.times).tolist():
        for rows in join_steps(found, found.times == times):
            where = shots.latitude_deg[rows], shots.longitude_deg[rows]
            lines.append(np.stack(where, -1))
            known.append({"times": times})
    days = shots.time_s / 86400
    facts = {
        "panoramas": len(shots),
        "sequences": len({item.sequence for item in items}),
        "drives": len(np.unique(drive)),
        "kilometres": round(found.metres() / 1000, 3),
        "at_two_times_km": round(found.metres(found.times > 1) / 1000, 3),
        "first_day": str(np.datetime64(int(days.min()), "D")),
        "last_day": str(np.datetime64(int(days.max()), "D")),
        "licences": dict(collections.Counter(item.licence for item in items)),
    }
    return facts, format_lines(lines, known)


def place_items(items: list[Item]) -> Shots:
    """Give what a service says of its pictures as the rows of a recording."""
    columns = {
        name: np.array([getattr(item, name) for item in items], float)
        for name in COLUMNS
    }
    origins = tuple(
        Origin(i.licence, i.attribution, i.anonymised, i.link, i.accuracy_m, i.id)
        for i in items
    )
    return Shots(tuple(item.name for item in items), **columns, origins=origins)
