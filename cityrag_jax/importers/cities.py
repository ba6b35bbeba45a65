"""A recording becomes a city: cut into drives, levelled, given one size, written.

What a recording is made of (a folder, a video, what a service offers) is known to the
importers beside this file. Pictures are levelled and resampled to one size
(`geo/levelling`), and written so that an interrupted import goes on (`data/store`).
import.json in the city tells what was made of the recording.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cityrag_jax.data.append import append_city, find_new
from cityrag_jax.data.captures import Captures, CityHeader
from cityrag_jax.data.masks import hide, read_mask
from cityrag_jax.data.provenance import Provenance, make_provenance
from cityrag_jax.data.shards import Job, Spread, map_ahead
from cityrag_jax.data.store import City
from cityrag_jax.data.writing import Picture, Writing, write_city
from cityrag_jax.files import write_whole
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.geo.levelling import fit_panorama
from cityrag_jax.importers.recordings import Cuts, Shots, make_captures, tabulate
from cityrag_jax.progress import Progress

HIGHEST = 2048  # of a panorama, where no height is asked for
SHOWN = 3  # names of a reason
Load = Callable[[], np.ndarray]


class Sphere(NamedTuple):
    """What a picture shows: the shares of a sphere's height that it lacks above and
    below, and the pixels that the whole sphere would be high."""

    above: float
    below: float
    height: int


@dataclasses.dataclass(frozen=True)
class Recording:
    """Placed pictures, and how they are read.

    `load` gives, for some of the names, what reads each: it is called in that order,
    the readers in threads. `skipped` names by reason what was left out before.
    `spacing_m` is the distance by which they were taken, 0 if not by distance.
    """

    kind: str
    shots: Shots
    spheres: list[Sphere]
    load: Callable[[list[str]], Iterator[Load]]
    notes: list[str]
    skipped: dict[str, list[str]]
    spacing_m: float = 0.0


@dataclasses.dataclass(frozen=True)
class Making:
    """How a city is made of a recording.

    `masks` holds a picture for each of the recording's, white where people and plates
    are to be blurred, as NAME.png; what has one counts as anonymised. `append` adds to
    the city what it does not hold. `spread` says who makes its files, in how many
    threads each. `finish` gets the folder before it has its name.
    """

    name: str
    height: int | None = None
    quality: int = 90
    cuts: Cuts = Cuts()
    masks: Path | None = None
    append: bool = False
    spread: Spread = map
    threads: int = os.cpu_count() or 1
    finish: Callable[[Path], object] | None = None


@dataclasses.dataclass(frozen=True)
class Panoramas:
    """The pictures of a recording, in order, as panoramas of one height.

    Called with two numbers it gives those from the one on up to the other, None for
    what cannot be decoded, made ahead in threads. It may travel to other processes.
    """

    recording: Recording
    masks: dict[str, Path]
    height: int
    threads: int

    def __len__(self) -> int:
        return len(self.recording.shots)

    def __call__(self, first: int, stop: int) -> Iterator[Picture]:
        names = list(self.recording.shots.names[first:stop])
        loads = zip(range(first, stop), self.recording.load(names), strict=True)
        return map_ahead(self._fit, loads, self.threads)

    def _fit(self, item: tuple[int, Load]) -> Picture:
        k, load = item
        shots = self.recording.shots
        try:
            picture = load()
        except ValueError:
            return None
        if shots.names[k] in self.masks:
            picture = hide(picture, read_mask(self.masks[shots.names[k]]))
        pitch_rad, roll_rad = (
            float(np.deg2rad(np.nan_to_num(angle[k])))
            for angle in (shots.pitch_deg, shots.roll_deg)
        )
        above, below, _ = self.recording.spheres[k]
        turned = dict(pitch_rad=pitch_rad, roll_rad=roll_rad)
        return fit_panorama(picture, self.height, above=above, below=below, **turned)


def _counted(made: Panoramas, bar: Progress, first: int, stop: int):
    """Give panoramas, and say of each that it is done."""
    bar.reach(first)
    for picture in made(first, stop):
        yield picture
        bar.update()


def _counting(spread: Spread, bar: Progress, job: Job, numbers: list[int]):
    """Spread files, and say of each that its panoramas are done."""
    bar.reach(job.count - job.shard * len(numbers))
    for number in spread(job, numbers):
        bar.update(min(job.shard, job.count - job.shard * number))
        yield number


def make_city(
    recording: Recording, making: Making, out: Path, *, overwrite: bool = False
) -> tuple[City, dict[str, Any]]:
    """Write a city from a recording; give it, and the report of import.json.

    Interrupted, the same call goes on behind the last whole file of panoramas.
    """
    old = City(out) if making.append else None
    if old:
        height = making.height or old.header.panorama_height
        making = dataclasses.replace(making, height=height)
        recording = _left_over(recording, old)
    masks, notes = find_masks(making.masks, recording.shots.names)
    shots = _blurred(recording.shots, masks)
    captures, chosen, report = make_captures(shots, making.cuts)
    shots = shots.select(chosen)
    spheres = [recording.spheres[k] for k in chosen.tolist()]
    report["skipped"] = recording.skipped | report["skipped"]
    report["notes"] = recording.notes + notes
    recording = dataclasses.replace(recording, shots=shots, spheres=spheres)
    header = _header(making, captures, recording)
    made = Panoramas(recording, masks, header.panorama_height, making.threads)

    def finish(folder: Path) -> None:
        there = set(City(folder).provenance.id.to_pylist())
        known = zip(origins.id.to_pylist(), shots.names, strict=True)
        lost = [name for told, name in known if told not in there]
        if lost:
            report["skipped"][f"{len(lost)} not decoded"] = lost
        report["pictures"] = len(captures) - len(lost)
        if making.finish:
            making.finish(folder)
        parts = np.unique(City(folder).captures.neighbourhood)
        report["neighbourhoods"] = len(parts)
        _write_report(folder, report, out if old else None)

    origins = _provenance(shots)
    with Progress(f"importing {making.name}", len(shots), "pano") as bar:
        pictures, spread = functools.partial(_counted, made, bar), making.spread
        if spread is not map:  # the bar stays here
            pictures, spread = made, functools.partial(_counting, spread, bar)
        how = Writing(making.quality, making.threads, spread, overwrite, finish=finish)
        if old is None:
            return write_city(out, header, captures, pictures, origins, how), report
        grown = append_city(
            old, header, captures, pictures, provenance=origins, how=how
        )
        return grown, report


def keep_spacing(folder: Path, asked_m: float) -> float:
    """Give the spacing of what is to be appended to a city: the city's own.

    ValueError for another one: clips would be as long as their drive was dense.
    """
    spacing_m = City(folder).header.generator.get("spacing_m", 0.0)
    if asked_m and spacing_m and asked_m != spacing_m:
        raise ValueError(
            f"{folder} was made with --spacing-m={spacing_m:g}, not {asked_m:g}: leave "
            "it out to append by the same, or build the city anew."
        )
    return asked_m or spacing_m


def _left_over(recording: Recording, city: City) -> Recording:
    """Leave out what a city holds, and what was left out when it was made."""
    shots, told = recording.shots, _read_report(city.folder)
    refused = set()
    while told:
        for names in told.get("skipped", {}).values():
            refused.update(names)
        told = told.get("before")
    new = find_new(city, list(shots.names), shots.time_s)
    new &= np.array([name not in refused for name in shots.names])
    if not new.any():
        raise ValueError(
            f"{city.folder} holds all of {len(shots)} pictures, or has refused them "
            "before; nothing to append."
        )
    rows = np.flatnonzero(new)
    spheres = [recording.spheres[k] for k in rows.tolist()]
    notes = [*recording.notes, f"{len(shots) - len(rows)} pictures are there already"]
    kept = {"shots": shots.select(rows), "spheres": spheres, "notes": notes}
    return dataclasses.replace(recording, **kept)


def _write_report(folder: Path, report: dict[str, Any], before: Path | None) -> None:
    """Write import.json; that of a city which was appended to goes inside."""
    if before:
        report = report | {"before": _read_report(before)}
    write_whole(folder / "import.json", json.dumps(report, indent=1) + "\n")


def _read_report(folder: Path) -> dict[str, Any]:
    """Read import.json; a city that was not imported has none."""
    path = folder / "import.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it.") from error


def find_masks(
    folder: Path | None, names: tuple[str, ...]
) -> tuple[dict[str, Path], list[str]]:
    """Give the mask of each picture that has one, and say how many have none."""
    if folder is None:
        return {}, []
    if not folder.is_dir():
        raise ValueError(f"--blur-masks={folder} is no folder of masks.")
    paths = {name: (folder / name).with_suffix(".png") for name in names}
    masks = {name: path for name, path in paths.items() if path.exists()}
    if not masks:
        raise ValueError(
            f"{folder} has no mask for any of {len(names)} pictures: that of "
            f"{names[0]} would be {paths[names[0]]}."
        )
    left = len(names) - len(masks)
    told = (
        f"{left} of {len(names)} pictures have no mask in {folder.name}/: not blurred"
    )
    return masks, [told] if left else []


def _blurred(shots: Shots, masks: dict[str, Path]) -> Shots:
    """Count as anonymised what a mask is there for."""
    origins = tuple(
        dataclasses.replace(origin, anonymised=origin.anonymised or name in masks)
        for name, origin in zip(shots.names, shots.origins, strict=True)
    )
    return dataclasses.replace(shots, origins=origins)


def _header(making: Making, captures: Captures, recording: Recording) -> CityHeader:
    shots = recording.shots
    middle_m = np.median(captures.ecef_from_camera[:, :3, 3], axis=0)
    anchor = tuple(round(float(x), 6) for x in geodetic_from_ecef(middle_m))
    median = int(np.median([sphere.height for sphere in recording.spheres]))
    height = making.height or min(HIGHEST, median // 8 * 8)
    generator = {
        "import": recording.kind,
        "jpeg_quality": making.quality,
        "cuts": dataclasses.asdict(making.cuts),
        "spacing_m": recording.spacing_m or making.cuts.spacing_m,
    }
    licences, _ = tabulate([origin.licence for origin in shots.origins])
    attributions, _ = tabulate([origin.attribution for origin in shots.origins])
    return CityHeader(making.name, height, anchor, licences, attributions, generator)


def _provenance(shots: Shots) -> Provenance:
    """Who wrote a height seldom says above what."""
    known = list(zip(shots.names, shots.origins, strict=True))
    accuracy = [origin.accuracy_m for origin in shots.origins]
    return make_provenance(
        [origin.id or name for name, origin in known],
        [name.rpartition("/")[0] for name in shots.names],
        [origin.link or None for origin in shots.origins],
        height_datum="unknown",
        accuracy_m=[None if np.isnan(x) else x for x in accuracy],
    )


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
