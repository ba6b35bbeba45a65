"""What a picture service has in an area, listed once and kept.

    listing.jsonl    the question, then for each area that was listed its pictures
    pictures/        SEQUENCE/ID.jpg, each there once it is whole

A listing that was interrupted goes on with the areas that are missing; a picture that
lies there is not fetched again. Degrees, metres, Unix seconds; NaN is unknown.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cityrag_jax.data.shards import map_ahead
from cityrag_jax.files import write_whole
from cityrag_jax.importers.tags import read_tags
from cityrag_jax.importers.web import Client, Refused, Unreachable
from cityrag_jax.progress import Progress

Skipped = dict[str, list[str]]
Box = tuple[float, float, float, float]  # west, south, east, north

TAIL = 1 << 16  # bytes in which a JPEG ends; some cameras put more behind it
ASKED, FETCHED = 4, 8  # areas and pictures at a time


@dataclasses.dataclass(frozen=True)
class Item:
    """A panorama that a service offers.

    Heading, pitch and roll are as GPano's. `sequence` names what was taken in one go,
    `link` where a person finds it. Places of one `group` were computed together, and
    may all lie off those of another by metres; the camera's own are in `gps_`.
    """

    id: str
    sequence: str
    url: str
    link: str
    licence: str
    attribution: str
    anonymised: bool
    time_s: float
    latitude_deg: float
    longitude_deg: float
    height_m: float = math.nan
    heading_deg: float = math.nan
    pitch_deg: float = math.nan
    roll_deg: float = math.nan
    accuracy_m: float = math.nan
    group: str = ""
    gps_latitude_deg: float = math.nan
    gps_longitude_deg: float = math.nan

    @property
    def name(self) -> str:
        """Where its picture lies below pictures/."""
        drive = f"{self.sequence}-{self.group}" if self.group else self.sequence
        return f"{_file_name(drive)}/{_file_name(self.id)}.jpg"


@dataclasses.dataclass(frozen=True)
class Service:
    """How one service is asked.

    `areas` are asked one by one: `list_area` gives the items of one and adds what it
    leaves out to a table of reasons. `renew` gives an item's present URL where the one
    in the listing is refused, None if it has no other.
    """

    question: dict[str, Any]
    areas: Sequence[Any]
    list_area: Callable[[Any, Skipped], list[Item]]
    renew: Callable[[Item], str | None]


def _file_name(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z_-]", "_", text) or "_"


def list_items(service: Service, folder: Path) -> tuple[list[Item], Skipped]:
    """List all areas that are not listed yet; give every item once, and why not all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "listing.jsonl"
    listed = _read_listing(path, service.question)
    missing = [a for a in service.areas if _key(a) not in listed]
    # Behind the last whole line: a killed writer may have left half of one.
    whole = [service.question, *({"area": k, **v} for k, v in listed.items())]
    _write_lines(path, whole)

    def list_one(area: Any) -> dict[str, Any]:
        left_out: Skipped = collections.defaultdict(list)
        found = service.list_area(area, left_out)
        return {"items": [_packed(item) for item in found], "skipped": left_out}

    with path.open("a") as file, Progress("listing", len(missing), "area") as bar:
        for area, kept in zip(
            missing, map_ahead(list_one, missing, ASKED), strict=True
        ):
            bar.update()
            file.write(json.dumps({"area": _key(area), **kept}) + "\n")
            file.flush()
            listed[_key(area)] = kept
    items: dict[str, Item] = {}
    skipped: dict[str, set[str]] = collections.defaultdict(set)
    for kept in listed.values():
        items |= {row["id"]: _unpacked(row) for row in kept["items"]}
        for reason, names in kept["skipped"].items():
            skipped[reason] |= set(names)
    ordered = [items[name] for name in sorted(items)]
    return ordered, {reason: sorted(names) for reason, names in skipped.items()}


def _key(area: Any) -> str:
    return json.dumps(area)


def _packed(item: Item) -> dict[str, Any]:
    row = dataclasses.asdict(item)
    return {k: v for k, v in row.items() if not (isinstance(v, float) and v != v)}


def _unpacked(row: dict[str, Any]) -> Item:
    return Item(**row)


def _read_listing(path: Path, question: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    lines = path.read_text().split("\n")
    try:
        asked, *areas = [json.loads(line) for line in lines[:-1]]
        listed = {row.pop("area"): row for row in areas}
        for kept in listed.values():
            [_unpacked(row) for row in kept["items"]]
    except (json.JSONDecodeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); remove it, pictures/ may stay."
        ) from error
    if asked != question:
        differ = [k for k in question if asked.get(k) != question[k]]
        told = ", ".join(
            f"{k} was {asked.get(k)!r}, is {question[k]!r}" for k in differ
        )
        raise ValueError(f"{path} lists something else ({told}); take another folder.")
    return listed


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def fetch_pictures(
    items: Sequence[Item],
    service: Service,
    client: Client,
    folder: Path,
    skipped: Skipped,
    *,
    threads: int = FETCHED,
) -> list[Item]:
    """Fetch the pictures that are not there; give the items whose picture is."""
    fetch = functools.partial(_fetch, service, client, folder / "pictures")
    there = []
    with Progress("fetching", len(items), "pano") as bar:
        results = map_ahead(fetch, items, threads)
        for item, refusal in zip(items, results, strict=True):
            if refusal is None:
                there.append(item)
            else:
                skipped.setdefault(refusal, []).append(item.id)
            bar.update()
    return there


def _fetch(service: Service, client: Client, folder: Path, item: Item) -> str | None:
    """Fetch one picture; give the reason if it cannot be had."""
    path = folder / item.name
    if path.exists():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            client.save(item.url, path, check_picture)
        except Refused:
            url = service.renew(item)
            if url is None:
                raise
            client.save(url, path, check_picture)
    except Refused as error:
        return f"picture refused with status {error.status}"
    except Unreachable:
        return "picture not fetched, the service does not answer: try again"
    return None


def check_picture(path: Path) -> None:
    """Raise ValueError for what is no picture, or a JPEG without its end."""
    read_tags(path)
    with path.open("rb") as file:
        head = file.read(2)
        file.seek(max(0, path.stat().st_size - TAIL))
        if head == b"\xff\xd8" and b"\xff\xd9" not in file.read():
            raise ValueError("the picture ends too early")


def cut_box(box: Box, side_deg: float) -> Iterator[Box]:
    """Cut a box into boxes whose sides are at most `side_deg`, row by row."""
    west, south, east, north = box
    columns = max(1, math.ceil((east - west) / side_deg - 1e-9))
    rows = max(1, math.ceil((north - south) / side_deg - 1e-9))
    for r in range(rows):
        for c in range(columns):
            yield tuple(
                round(x, 7)
                for x in (
                    west + (east - west) * c / columns,
                    south + (north - south) * r / rows,
                    west + (east - west) * (c + 1) / columns,
                    south + (north - south) * (r + 1) / rows,
                )
            )


def read_box(text: str) -> Box:
    """Read WEST,SOUTH,EAST,NORTH in degrees."""
    try:
        west, south, east, north = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--bbox is {text!r}; give WEST,SOUTH,EAST,NORTH in degrees, such as "
            "--bbox=-1.488,43.489,-1.466,43.497."
        ) from None
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(
            f"--bbox runs from {west} to {east} east and from {south} to {north} "
            "north; give WEST,SOUTH,EAST,NORTH (longitude first) in degrees."
        )
    return west, south, east, north


def inside(box: Box, latitude_deg: float, longitude_deg: float) -> bool:
    """Say whether a place lies in a box."""
    west, south, east, north = box
    return west <= longitude_deg <= east and south <= latitude_deg <= north
