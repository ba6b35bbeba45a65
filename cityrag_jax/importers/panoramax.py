"""Panoramax: panoramas of the street that anyone may use, from a federation of servers.

A STAC API without a key: GET /search?bbox=W,S,E,N&limit= and /collections/ID/items, as
panoramax/server/api (geovisio/web/items.py) answers them. Of an item are read `id`,
`collection`, `geometry`, `assets.hd.href`, `links` (self, license, next), `providers`
and of its `properties` datetime, license, view:azimuth, pers:pitch, pers:roll,
pers:yaw, pers:interior_orientation.field_of_view, quality:horizontal_accuracy,
geovisio:producer and exif (whose GPSAltitude is the only height). The catalogue of all
servers answers for them, and an item's addresses lead to its own.

view:azimuth is the compass heading of the picture's centre; pers:yaw stands in for it
where it is silent (*assumed*: of a sphere both are the same angle).
"""

import datetime
import math
import urllib.parse
from collections.abc import Iterator
from typing import Any

from cityrag_jax.importers.listing import Box, Item, Service, Skipped, cut_box, inside
from cityrag_jax.importers.web import Client

CATALOGUE = "https://api.panoramax.xyz/api"
# Servers that blur people and plates of all pictures before they show them.
BLURRING = ("panoramax.ign.fr", "panoramax.openstreetmap.fr")
AREA_DEG, LEAST_DEG = 0.01, 1e-5  # a metre: what stands still may be cut short
PAGE = 1000  # items an answer; search gives 10 unless told, at most 10,000
NO_LICENCE = ("", "proprietary", "various", "other")  # STAC: the licence is elsewhere


def open_panoramax(
    client: Client,
    *,
    box: Box | None = None,
    collections: tuple[str, ...] = (),
    api: str = CATALOGUE,
    licence: str | None = None,
    anonymised: bool = False,
) -> Service:
    """Give a service of all that lies in a box, or of some sequences.

    `licence` is for items that tell none; without it they are left out. `anonymised`
    says so of servers that are not known to blur.
    """
    api = api.rstrip("/")
    question = {"service": "panoramax", "api": api, "licence": licence}
    question |= {"anonymised": anonymised}
    if collections:
        question["collections"] = list(collections)
        areas: list[Any] = list(collections)
    elif box is not None:
        question["bbox"] = list(box)
        areas = [list(part) for part in cut_box(box, AREA_DEG)]
    else:
        raise ValueError("Give --bbox=WEST,SOUTH,EAST,NORTH or --collection=ID.")

    def list_area(area: Any, skipped: Skipped) -> list[Item]:
        if isinstance(area, str):
            url = f"{api}/collections/{urllib.parse.quote(area)}/items"
            pages = _pages(client, url, {"limit": PAGE})
            documents = [item for page in pages for item in page]
        else:
            documents = list(_search(client, api, tuple(area)))
        items = []
        for document in documents:
            if isinstance(area, list) and box and not _lies_in(box, document):
                continue
            read = read_item(document, licence, anonymised)
            if isinstance(read, Item):
                items.append(read)
            else:
                skipped[read].append(str(document.get("id")))
        return items

    return Service(question, areas, list_area, lambda item: None)


def _search(client: Client, api: str, box: Box) -> Iterator[dict[str, Any]]:
    """Give the items of a box; a full answer that has no next page is asked in four."""
    query = {"bbox": ",".join(f"{x:.7f}" for x in box), "limit": PAGE}
    found, last = [], 0
    for page in _pages(client, f"{api}/search", query):
        found += page
        last = len(page)
    side_deg = max(box[2] - box[0], box[3] - box[1])
    if last < PAGE or side_deg < LEAST_DEG:
        yield from found
        return
    for part in cut_box(box, side_deg / 2):
        yield from _search(client, api, part)


def _pages(client: Client, url: str, query: dict) -> Iterator[list[dict[str, Any]]]:
    """Give the items of an answer and of those that it calls next."""
    seen = set()
    while url not in seen:
        seen.add(url)
        document = client.read_json(url, **query)
        features = document.get("features")
        if not isinstance(features, list):
            raise ValueError(
                f"{url} answers {sorted(document)} and no features: it is no STAC "
                "search. Give the root of its API, such as --api=" + CATALOGUE + "."
            )
        yield [item for item in features if isinstance(item, dict)]
        links = document.get("links") or ()
        following = next((x["href"] for x in links if x.get("rel") == "next"), None)
        if not following or not features:
            return
        url, query = urllib.parse.urljoin(url, following), {}


def _lies_in(box: Box, document: dict) -> bool:
    place = _place(document)
    return place is None or inside(box, *place)


def _place(document: dict) -> tuple[float, float] | None:
    geometry = document.get("geometry") or {}
    coordinates = geometry.get("coordinates")
    if geometry.get("type") != "Point" or not isinstance(coordinates, list):
        return None
    longitude_deg, latitude_deg = map(_number, coordinates[:2])
    if not (abs(latitude_deg) <= 90 and abs(longitude_deg) <= 180):
        return None
    return latitude_deg, longitude_deg


def read_item(document: dict, licence: str | None, anonymised: bool) -> Item | str:
    """Read a STAC item; give the reason where it cannot be used."""
    facts, place = document.get("properties") or {}, _place(document)
    camera = facts.get("pers:interior_orientation") or {}
    url = ((document.get("assets") or {}).get("hd") or {}).get("href")
    if _number(camera.get("field_of_view")) != 360:
        return "not a panorama of 360 degrees"
    if place is None:
        return "no place"
    if not isinstance(url, str):
        return "no address of the picture (assets.hd.href)"
    time_s = _moment(facts.get("datetime"))
    if math.isnan(time_s):
        return "no time of capture"
    told = str(facts.get("license") or "")
    told = licence or "" if told.lower() in NO_LICENCE else told
    if not told:
        return "no licence (--licence=SPDX if you know it)"
    links = {x.get("rel"): x.get("href") for x in document.get("links") or ()}
    link = str(links.get("self") or url)
    host = urllib.parse.urlsplit(url).hostname or ""
    exif = facts.get("exif") or {}
    azimuth = _number(facts.get("view:azimuth"))
    return Item(
        id=str(document.get("id")),
        sequence=str(document.get("collection")),
        url=urllib.parse.urljoin(link, url),
        link=link,
        licence=told,
        attribution=f"{_producer(document, facts)} via Panoramax ({host})",
        anonymised=anonymised or host in BLURRING,
        time_s=time_s,
        latitude_deg=place[0],
        longitude_deg=place[1],
        height_m=_number(exif.get("Exif.GPSInfo.GPSAltitude")),
        heading_deg=_number(facts.get("pers:yaw")) if azimuth != azimuth else azimuth,
        pitch_deg=_number(facts.get("pers:pitch")),
        roll_deg=_number(facts.get("pers:roll")),
        accuracy_m=_number(facts.get("quality:horizontal_accuracy")),
    )


def _producer(document: dict, facts: dict) -> str:
    producers = [
        str(provider["name"])
        for provider in document.get("providers") or ()
        if "producer" in (provider.get("roles") or ()) and provider.get("name")
    ]
    told = facts.get("geovisio:producer")
    producers = producers or ([str(told)] if told else ["unknown"])
    return " and ".join(dict.fromkeys(producers))


def _number(value: Any) -> float:
    """Read a number, or EXIF's fraction such as 3300/100."""
    try:
        above, _, below = str(value).partition("/")
        number = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _moment(text: Any) -> float:
    try:
        moment = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return math.nan
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return moment.timestamp()
