"""What a picture service has in an area becomes a city: listed, fetched, placed.

Three steps, each of which goes on where it was interrupted: the listing, the pictures
(`listing`), and the city (`cities`).
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from cityrag_jax.data.store import City, check_free
from cityrag_jax.importers.cities import Making, Recording, make_city
from cityrag_jax.importers.folder import load_pictures, sphere_of
from cityrag_jax.importers.listing import (
    Item,
    Service,
    Skipped,
    fetch_pictures,
    list_items,
)
from cityrag_jax.importers.mapillary import align_groups
from cityrag_jax.importers.recordings import COLUMNS, Origin, Shots
from cityrag_jax.importers.tags import read_tags
from cityrag_jax.importers.web import Client


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
    check_free(out, overwrite)
    items, skipped = list_items(service, folder)
    if not items:
        told = "; ".join(f"{len(names)} {why}" for why, names in skipped.items())
        raise ValueError(
            f"{service.question} gives no panorama that can be used ({told or 'none'})."
        )
    found = len(items)
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


def place_items(items: list[Item]) -> Shots:
    """Give what a service says of its pictures as the rows of a recording."""
    columns = {
        name: np.array([getattr(item, name) for item in items], float)
        for name in COLUMNS
    }
    origins = tuple(
        Origin(i.licence, i.attribution, i.anonymised, i.link, i.accuracy_m)
        for i in items
    )
    return Shots(tuple(item.name for item in items), **columns, origins=origins)
