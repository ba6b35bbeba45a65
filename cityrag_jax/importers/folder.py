"""A folder of 360-degree pictures becomes a city.

Pictures are equirectangular, of any sizes; where and how each was taken is told by its
EXIF and GPano tags (`tags`) or by a pose file (`geo/pose_files`). Pictures that cannot
serve are left out with a reason, the others are levelled and resampled to one size
(`geo/levelling`), and written so that an interrupted import goes on (`data/store`).
import.json in the city tells what was made of the recording.
"""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from cityrag_jax.data.captures import Captures, CityHeader
from cityrag_jax.data.provenance import Provenance, make_provenance
from cityrag_jax.data.records import map_ahead
from cityrag_jax.data.store import City, Picture, check_free, write_city
from cityrag_jax.data.video import read_image
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.geo.levelling import fit_panorama
from cityrag_jax.geo.pose_files import Placements, parse_placements, place_at_times
from cityrag_jax.importers.recordings import Cuts, Shots, make_captures
from cityrag_jax.importers.tags import Tags, read_tags

PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
# What people have in such folders and cannot be used, with the remedy.
OTHERS = {
    ".heic": "HEIC: convert them to JPEG, keeping the tags",
    ".heif": "HEIC: convert them to JPEG, keeping the tags",
    ".dng": "raw: develop them to JPEG, keeping the tags",
    ".gpr": "raw: develop them to JPEG, keeping the tags",
    ".insp": "two fisheyes: export equirectangular JPEGs with the camera's program",
    ".insv": "video of two fisheyes: export an equirectangular MP4, then its frames",
    ".360": "video of two fisheyes: export an equirectangular MP4, then its frames",
    ".mp4": "video: extract its frames as JPEGs",
    ".mov": "video: extract its frames as JPEGs",
}
HIGHEST = 2048  # of a panorama, where no height is asked for
ROUND = 0.01  # a sphere is twice as wide as high
NEEDED_DEG = 35.0  # above and below the horizon: views of 65 degrees, and some more
TRACK_GAP_S = 10.0  # between points of a track
SHOWN = 3  # names of a reason


@dataclasses.dataclass(frozen=True)
class Source:
    """Whose pictures they are, and how they become a city.

    `poses` is a pose file that replaces the pictures' own places; `clock_s` is added
    to the pictures' times before they are looked up on a track, or counted.
    """

    folder: Path
    name: str
    licence: str
    attribution: str
    anonymised: bool = False
    poses: Path | None = None
    clock_s: float = 0.0
    height: int | None = None
    quality: int = 90
    cuts: Cuts = Cuts()


def import_folder(
    source: Source, out: Path, *, overwrite: bool = False
) -> tuple[City, dict[str, Any]]:
    """Write a city from a folder of pictures; give it, and the report of import.json.

    Interrupted, the same call goes on behind the last whole file of panoramas.
    """
    check_free(out, overwrite)
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    tags = find_pictures(source.folder, skipped)
    shots, tags, notes = place_pictures(source, tags, skipped)
    captures, chosen, report = make_captures(shots, source.cuts, source.anonymised)
    tags = [tags[k] for k in chosen.tolist()]
    names = [shots.names[k] for k in chosen.tolist()]
    skipped |= report.pop("skipped")
    header = _header(source, captures, tags)
    bar = tqdm.tqdm(total=len(names), desc=f"importing {source.name}", unit="pano")
    unreadable: list[str] = []
    with bar:
        make = functools.partial(_fit_all, source, names, tags, header, bar, unreadable)
        city = write_city(
            out,
            header,
            captures,
            make,
            provenance=_provenance(names),
            quality=source.quality,
            overwrite=overwrite,
        )
    lost = len(captures) - len(city)
    if lost:
        skipped[f"{lost} not decoded"] = unreadable
    report |= {"pictures": len(names) - lost, "notes": notes, "skipped": dict(skipped)}
    temporary = city.folder / f".import-{os.getpid()}.json"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, city.folder / "import.json")
    return city, report


def find_pictures(folder: Path, skipped: dict[str, list[str]]) -> dict[str, Tags]:
    """Read the tags of all panoramas below a folder, by their paths in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of pictures.")
    found, sizes = {}, collections.Counter()
    for path in sorted(folder.rglob("*")):
        name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
        if path.name.startswith(".") or not path.is_file():
            continue
        if suffix in OTHERS:
            skipped[OTHERS[suffix]].append(name)
        elif suffix in PICTURES:
            try:
                tags = read_tags(path)
                sizes[f"{tags.width}x{tags.height}"] += 1
                _shares(tags)
            except ValueError as error:
                reason = str(error).replace(f"{path} ", "").rstrip(".")
                skipped[reason].append(name)
            else:
                found[name] = tags
    if not found:
        raise ValueError(
            f"{folder} holds no panoramas{_first_reasons(skipped)}. Give "
            f"equirectangular pictures as {', '.join(PICTURES)}."
        )
    return found


def _first_reasons(skipped: dict[str, list[str]]) -> str:
    told = [f"{len(names)} {reason}" for reason, names in skipped.items()]
    return f" ({'; '.join(told[:5])})" if told else ""


def _shares(tags: Tags) -> tuple[float, float]:
    """Give the shares of a sphere's height that a picture lacks above and below.

    ValueError if it is none that looks all around.
    """
    if tags.projection not in (None, "equirectangular"):
        raise ValueError(f"is {tags.projection}, not equirectangular")
    window = tags.window
    if window is None:
        if abs(tags.width / tags.height - 2) > 2 * ROUND:
            raise ValueError(
                f"is {tags.width}x{tags.height}: no panorama, which is twice as wide "
                "as high, and GPano tags do not say what part of one"
            )
        return 0.0, 0.0
    if window.width < window.full_width * (1 - ROUND) or not window.full_height:
        around = 360 * window.width / max(window.full_width, 1)
        raise ValueError(f"shows {around:.0f} of 360 degrees around")
    above = window.top / window.full_height
    below = 1 - above - window.height / window.full_height
    if max(above, below) * 180 > 90 - NEEDED_DEG or below < -ROUND:
        raise ValueError(
            f"shows {90 - 180 * above:.0f} degrees above and {90 - 180 * below:.0f} "
            f"below the horizon, {NEEDED_DEG:g} are needed"
        )
    return above, max(below, 0.0)


def place_pictures(
    source: Source, found: dict[str, Tags], skipped: dict[str, list[str]]
) -> tuple[Shots, list[Tags], list[str]]:
    """Give the pictures whose place and time are known, and what is to be doubted."""
    names, tags = list(found), list(found.values())
    columns = {
        name: np.array([getattr(t, name) for t in tags], float)
        for name in [f.name for f in dataclasses.fields(Shots)][1:]
    }
    columns["time_s"] += source.clock_s
    notes = _doubts(tags, source)
    if source.poses is not None:
        text = source.poses.read_text(encoding="utf-8-sig")
        _replace_places(columns, names, parse_placements(text, source.poses.name))
    placed = ~np.isnan(columns["latitude_deg"] + columns["longitude_deg"])
    timed = ~np.isnan(columns["time_s"])
    where = "the pose file" if source.poses else "its EXIF (or give --poses=FILE)"
    for k in np.flatnonzero(~placed).tolist():
        skipped[f"no place in {where}"].append(names[k])
    for k in np.flatnonzero(placed & ~timed).tolist():
        skipped["no time of capture"].append(names[k])
    kept = np.flatnonzero(placed & timed)
    if len(kept) == 0:
        raise ValueError(
            f"None of {len(names)} panoramas in {source.folder} has a place and a time"
            f"{_first_reasons(skipped)}."
        )
    shots = Shots(tuple(names), **columns).select(kept)
    return shots, [tags[k] for k in kept.tolist()], notes


def _replace_places(columns: dict, names: list[str], poses: Placements) -> None:
    """Put a pose file's rows in the place of the tags, by name or else by time."""
    if poses.names is None:
        columns |= place_at_times(poses, columns["time_s"], TRACK_GAP_S)
        return
    rows = {Path(name).as_posix(): k for k, name in enumerate(poses.names)}
    bases = collections.Counter(Path(name).name for name in poses.names)
    alone = {Path(n).name: k for n, k in rows.items() if bases[Path(n).name] == 1}
    row = np.array([rows.get(n, alone.get(Path(n).name, -1)) for n in names])
    for name in columns:
        told = np.where(row >= 0, getattr(poses, name)[row], np.nan)
        if name in ("time_s", "heading_deg"):  # the tags' own, where it is silent
            told = np.where(np.isnan(told), columns[name], told)
        columns[name] = told


def _doubts(tags: list[Tags], source: Source) -> list[str]:
    notes = []
    zoneless = sum(not t.time_is_utc for t in tags)
    if zoneless:
        notes.append(
            f"{zoneless} pictures do not tell their time zone: taken for UTC "
            "(--clock-offset-s adds seconds)"
        )
    magnetic = sum(t.magnetic for t in tags)
    if magnetic and not source.cuts.declination_deg:
        notes.append(
            f"headings of {magnetic} pictures are magnetic: give --declination-deg"
        )
    return notes


def _header(source: Source, captures: Captures, tags: list[Tags]) -> CityHeader:
    middle_m = np.median(captures.ecef_from_camera[:, :3, 3], axis=0)
    anchor = tuple(round(float(x), 6) for x in geodetic_from_ecef(middle_m))
    full = [t.window.full_height if t.window else t.height for t in tags]
    height = source.height or min(HIGHEST, int(np.median(full)) // 8 * 8)
    generator = {
        "import": "folder",
        "jpeg_quality": source.quality,
        "cuts": dataclasses.asdict(source.cuts),
    }
    licences, attributions = (source.licence,), (source.attribution,)
    return CityHeader(source.name, height, anchor, licences, attributions, generator)


def _provenance(names: list[str]) -> Provenance:
    """Pictures are known by their paths; who wrote a height seldom says above what."""
    folders = [name.rpartition("/")[0] for name in names]
    return make_provenance(names, folders, height_datum="unknown")


def _fit_all(
    source: Source,
    names: list[str],
    tags: list[Tags],
    header: CityHeader,
    bar: tqdm.tqdm,
    unreadable: list[str],
    first: int,
) -> Iterator[Picture]:
    """Give the panoramas of pictures from one on; None for what cannot be decoded."""

    def fit(k: int) -> Picture:
        above, below = _shares(tags[k])
        try:
            picture = read_image(source.folder / names[k])
        except ValueError:
            return None
        kinds = {
            "pitch_rad": float(np.deg2rad(np.nan_to_num(tags[k].pitch_deg))),
            "roll_rad": float(np.deg2rad(np.nan_to_num(tags[k].roll_deg))),
        }
        height = header.panorama_height
        return fit_panorama(picture, height, above=above, below=below, **kinds)

    bar.update(first)
    numbers = range(first, len(names))
    fitted = map_ahead(fit, numbers, os.cpu_count() or 1)
    for k, panorama in zip(numbers, fitted, strict=True):
        if panorama is None:
            unreadable.append(names[k])
        bar.update()
        yield panorama


def describe_import(report: dict[str, Any]) -> str:
    """Sum up an import in a few lines."""
    lines = [
        f"{report['pictures']} pictures in {report['drives']} drives, "
        f"{report['neighbourhoods']} neighbourhoods; heights {report['heights']}"
    ]
    for drive in report["by_drive"]:
        mount = "no headings given"
        if drive["mount_deg"] is not None:
            mount = (
                f"camera {drive['mount_deg']:g} degrees right of the course "
                f"(within {drive['mount_spread_deg']:g})"
            )
        lines.append(
            f"  {drive['folder'] or '.'}/{drive['first']}: {drive['captures']} "
            f"captures, {drive['metres']:g} m, {drive['spacing_m']} m apart; {mount}"
        )
    lines += [f"  note: {note}" for note in report["notes"]]
    for reason, names in report["skipped"].items():
        more = ", ..." if len(names) > SHOWN else ""
        listed = f"{', '.join(names[:SHOWN])}{more}"
        lines.append(f"  skipped {len(names)}, {reason}: {listed}")
    return "\n".join(lines)
