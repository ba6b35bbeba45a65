"""A folder of 360-degree pictures as the recording that becomes a city.

Pictures are equirectangular, of any sizes; where and how each was taken is told by its
EXIF and GPano tags (`tags`) or by a pose file (`geo/pose_files`). Pictures that cannot
serve are left out with a reason.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cityrag_jax.data.store import City
from cityrag_jax.data.takedown import names_of, read_taken
from cityrag_jax.data.video import read_image
from cityrag_jax.data.writing import check_free
from cityrag_jax.geo.pose_files import Placements, parse_placements, place_at_times
from cityrag_jax.importers.cities import Load, Making, Recording, Sphere, make_city
from cityrag_jax.importers.recordings import COLUMNS, Origin, Shots
from cityrag_jax.importers.tags import Tags, read_tags

PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
# What people have in such folders and cannot be used, with the remedy.
OTHERS = {
    ".heic": "HEIC: convert them to JPEG, keeping the tags",
    ".heif": "HEIC: convert them to JPEG, keeping the tags",
    ".dng": "raw: develop them to JPEG, keeping the tags",
    ".gpr": "raw: develop them to JPEG, keeping the tags",
    ".insp": "two fisheyes: export equirectangular JPEGs with the camera's program",
    ".insv": "two fisheyes: export an equirectangular MP4, then --source=video",
    ".360": "two fisheyes: export an equirectangular MP4, then --source=video",
    ".mp4": "video: --source=video makes a city of it",
    ".mov": "video: --source=video makes a city of it",
}
ROUND = 0.01  # a sphere is twice as wide as high
NEEDED_DEG = 35.0  # above and below the horizon: views of 65 degrees, and some more
TRACK_GAP_S = 10.0  # between points of a track
PLACE = ("latitude_deg", "longitude_deg", "height_m")


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder of pictures, and whose they are.

    `poses` is a pose file that replaces the pictures' own places; `clock_s` is added
    to the pictures' times before they are looked up on a track, or counted.
    """

    folder: Path
    origin: Origin
    poses: Path | None = None
    clock_s: float = 0.0
    anchor: tuple[float, float, float] | None = None


def import_folder(
    source: Source, making: Making, out: Path, *, overwrite: bool = False
) -> tuple[City, dict[str, Any]]:
    """Write a city from a folder of pictures; give it, and the report of import.json.

    Interrupted, the same call goes on behind the last whole file of panoramas.
    """
    check_free(out, overwrite or making.append)
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    tags = find_pictures(source.folder, skipped)
    shots, tags, notes = place_pictures(source, tags, skipped)
    if magnetic := sum(t.magnetic for t in tags):
        if not making.cuts.declination_deg:
            told = f"headings of {magnetic} pictures are magnetic"
            notes.append(f"{told}: give --declination-deg")
    spheres = [sphere_of(t) for t in tags]
    load = functools.partial(load_pictures, source.folder)
    recording = Recording("folder", shots, spheres, load, notes, skipped)
    return make_city(recording, making, out, overwrite=overwrite)


def load_pictures(folder: Path, names: list[str]) -> Iterator[Load]:
    """Give what reads each picture of a folder."""
    for name in names:
        yield functools.partial(_load, folder / name)


def _load(path: Path) -> np.ndarray:
    return read_image(path)


def find_pictures(folder: Path, skipped: dict[str, list[str]]) -> dict[str, Tags]:
    """Read the tags of all panoramas below a folder, by their paths in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of pictures.")
    found, sizes, taken = {}, collections.Counter(), read_taken(folder)
    for path in sorted(folder.rglob("*")):
        name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
        if path.name.startswith(".") or not path.is_file():
            continue
        if taken & names_of(path, folder):
            skipped["taken down"].append(name)
        elif suffix in OTHERS:
            skipped[OTHERS[suffix]].append(name)
        elif suffix in PICTURES:
            try:
                tags = read_tags(path)
                sizes[f"{tags.width}x{tags.height}"] += 1
                sphere_of(tags)
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


def sphere_of(tags: Tags) -> Sphere:
    """Give what a picture shows of a sphere; ValueError if not all around."""
    if tags.projection not in (None, "equirectangular"):
        raise ValueError(f"is {tags.projection}, not equirectangular")
    window = tags.window
    if window is None:
        if abs(tags.width / tags.height - 2) > 2 * ROUND:
            raise ValueError(
                f"is {tags.width}x{tags.height}: no panorama, which is twice as wide "
                "as high, and GPano tags do not say what part of one"
            )
        return Sphere(0.0, 0.0, tags.height)
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
    return Sphere(above, max(below, 0.0), window.full_height)


def place_pictures(
    source: Source, found: dict[str, Tags], skipped: dict[str, list[str]]
) -> tuple[Shots, list[Tags], list[str]]:
    """Give the pictures whose place and time are known, and what is to be doubted."""
    names, tags = list(found), list(found.values())
    columns = {
        name: np.array([getattr(t, name) for t in tags], float) for name in COLUMNS
    }
    columns["time_s"] += source.clock_s
    own_s = columns["time_s"].copy()
    if source.poses is not None:
        text = source.poses.read_text(encoding="utf-8-sig")
        told = parse_placements(text, source.poses.name, source.anchor)
        _replace_places(columns, names, told)
    notes = _doubts([tags[k] for k in np.flatnonzero(columns["time_s"] == own_s)])
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
    origins = (source.origin,) * len(names)
    shots = Shots(tuple(names), **columns, origins=origins).select(kept)
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
        if name not in PLACE:  # the tags' own, where it is silent
            told = np.where(np.isnan(told), columns[name], told)
        columns[name] = told


def _doubts(tags: list[Tags]) -> list[str]:
    zoneless = sum(not t.time_is_utc for t in tags)
    if not zoneless:
        return []
    return [
        f"{zoneless} pictures do not tell their time zone: taken for UTC "
        "(--clock-offset-s adds seconds)"
    ]
