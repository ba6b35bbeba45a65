"""Look at a city, and at what a path through it will be conditioned on:

    python -m cityrag_jax.survey --city=DIR [--path=walk.geojson] --out=DIR

Needs no weights. OUT will hold city.json (drives, spacing, heights, headings against
course, pairs, licences), city.png and lacking.geojson (streets that need one more pass
to be trained on); with a path also path.json (how much of it is
captured, how near, by which drives and when), path.png, conditions.mp4 (the views that
a video along the path is built on) and contacts.jpg, some of them with their place.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from cityrag_jax import report
from cityrag_jax.commands import Command
from cityrag_jax.data import inventory
from cityrag_jax.data.clips import ClipConfig, cover_people, show_views
from cityrag_jax.data.masks import Shown
from cityrag_jax.data.pairs import PAIRS, Pairs, load_pairs
from cityrag_jax.data.paths import read_path
from cityrag_jax.data.store import City
from cityrag_jax.data.video import write_image, write_video
from cityrag_jax.files import open_folder
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.geo.grounding import WAYS, Views, ground_path
from cityrag_jax.geo.matching import Costs, Match, match_path
from cityrag_jax.geo.path_files import format_lines
from cityrag_jax.geo.revisits import join_steps
from cityrag_jax.rerun_file import import_rerun, write_rerun

NEAR_M = (2, 5, 10)
CONTACTS, CONTACT_WIDTH = 12, 320
NAMED = 3  # neighbourhoods


def survey_city(city: City, out: Path) -> dict[str, Any]:
    """Write city.json, city.png, and lacking.geojson: what was driven at one time."""
    pairs = None
    if (city.folder / PAIRS).exists():
        pairs = load_pairs(city.folder)
    facts = inventory.count_city(city, pairs)
    facts["streets"], lacking = _streets(city)
    report.write_text(out / "lacking.geojson", lacking)
    facts["look_at"] = inventory.find_doubts(facts)
    report.write_text(out / "city.json", json.dumps(facts, indent=1) + "\n")
    edges = city.index.drive_edges
    begins_m = _pair_places(city, pairs)
    times_s = city.captures.time_s[edges[:-1]].tolist()
    report.draw_drives(out / "city.png", _drives(city), times_s, begins_m)
    return facts


def _streets(city: City) -> tuple[dict[str, Any], str]:
    """Give figures of the streets, and the lines of those driven at one time alone."""
    found = inventory.find_streets(city)
    lines, facts = [], []
    for rows in join_steps(found, found.times < 2):
        latitude, longitude, _ = geodetic_from_ecef(city.index.position_m[rows])
        lines.append(np.stack([latitude, longitude], -1))
        facts.append({"drive": int(city.captures.drive[rows[0]]), "times": 1})
    return inventory.count_streets(city, found), format_lines(lines, facts)


def survey_path(
    city: City,
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    config: ClipConfig,
    out: Path,
    *,
    way: str = WAYS[0],
    radius_m: float = Costs.radius_m,
    fps: float = 10.0,
    rerun: bool = False,
) -> dict[str, Any]:
    """Write path.json, path.png, contacts.jpg and conditions.mp4, maybe path.rrd."""
    match = match_path(city.index, ecef_from_camera, Costs(radius_m=radius_m))
    views = ground_path(city.index, ecef_from_camera, match, way)
    if len(views) == 0:
        distance_m, _ = city.index.tree.query(ecef_from_camera[:, :3, 3], workers=1)
        raise ValueError(
            f"{city.folder} has no capture within {radius_m} m of the path; the "
            f"nearest is {distance_m.min():.0f} m away. Draw it along captured streets "
            "(city.png shows them), or are latitude and longitude swapped?"
        )
    frames = show_views(city, views, config)
    frames, shown = cover_people(city, views, frames, config)
    facts = path_facts(city, ecef_from_camera, match, views) | shown._asdict()
    report.write_text(out / "path.json", json.dumps(facts, indent=1) + "\n")
    _draw_path(city, ecef_from_camera, views, out / "path.png")
    write_video(out / "conditions.mp4", frames, fps)
    write_image(out / "contacts.jpg", _contacts(city, views, frames))
    if rerun:
        rrd = out / "path.rrd"
        write_rerun(rrd, city, ecef_from_camera, views, frames, config.fov_deg)
    return facts


def path_facts(
    city: City,
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    match: Match,
    views: Views,
) -> dict[str, Any]:
    """Say how much of a path is captured, how near, by which drives and when."""
    columns, step_m = city.captures, match.step_m
    distance_m = np.nan_to_num(match.distance_m, nan=np.inf)
    drives = columns.drive[views.captures]
    changes = np.flatnonzero(np.diff(drives)) + 1
    used = drives[np.concatenate([[0], changes])]
    days = columns.time_s[views.captures] / 86400
    newest = columns.time_s.max() / 86400
    sources = inventory.count_sources(city, np.unique(views.captures))
    return {
        "metres": round((len(match.run) - 1) * step_m, 1),
        "poses": len(ecef_from_camera),
        "views": len(views),
        "share_within": {
            f"{near}_m": round(float(np.mean(distance_m <= near)), 4) for near in NEAR_M
        },
        "gaps_m": [[round(a * step_m), round(b * step_m)] for a, b in match.gaps()],
        "drives": used.tolist(),
        "jumps": match.jumps,
        "jumps_at_pose": [round(float(views.frame[k]), 1) for k in changes],
        "against_the_drive": round(float(np.mean(match.backward)), 4),
        "captured": sorted({_day(day) for day in days.tolist()}),
        "days_older_than_the_newest": round(float(newest - days.min())),
        "sources": sources,
    }


def describe_city(facts: dict[str, Any]) -> str:
    """Sum up a city in a few lines."""
    spacing_m = facts["spacing_m"]
    pairs = "pairs not mined yet (tools/build_city.py --mine)"
    if "pairs" in facts:
        pairs = f"{facts['pairs_to_train']} pairs to train on, "
        pairs += f"{facts['pairs_held_out']} held out"
    lines = [
        f"{facts['city']}: {facts['captures']} captures, {facts['drives']} drives, "
        f"{facts['kilometres']} km, {facts['first_day']} to {facts['last_day']}",
        f"  {spacing_m['median']} m apart (95 % below {spacing_m['percentile_95']} m), "
        f"{facts['standing_share']:.0%} standing, {facts['gaps']} gaps",
        f"  {facts['seen_twice_share']:.0%} of places captured at two times; {pairs}",
        _describe_streets(facts["streets"]),
        *(_describe_source(source) for source in facts["sources"]),
        *(f"  look at: {doubt}" for doubt in facts["look_at"]),
    ]
    return "\n".join(lines)


def _describe_streets(streets: dict[str, Any]) -> str:
    told = (
        f"  {streets['kilometres']} km of streets, {streets['at_two_times_km']} km at "
        "two times or more"
    )
    if not streets["lacking_a_pass_km"]:
        return told
    parts = streets["lacking_by_neighbourhood_km"]
    most = sorted(parts, key=parts.get, reverse=True)[:NAMED]
    where = ", ".join(f"{parts[k]} km in neighbourhood {k}" for k in most)
    return (
        f"{told}; one more pass of {streets['lacking_a_pass_km']} km would pair them "
        f"all: {where} (lacking.geojson)"
    )


def describe_path(facts: dict[str, Any]) -> str:
    """Sum up a path in a few lines."""
    near = ", ".join(
        f"{share:.0%} within {name.replace('_', ' ')}"
        for name, share in facts["share_within"].items()
    )
    drives = " -> ".join(map(str, facts["drives"]))
    gaps = ", ".join(f"{a} to {b} m" for a, b in facts["gaps_m"]) or "none"
    lines = [
        f"path: {facts['metres']} m, {facts['poses']} poses; {near}",
        f"  drives {drives} ({facts['jumps']} jumps), "
        f"{facts['against_the_drive']:.0%} against the drive; gaps: {gaps}",
        *(_describe_source(source) for source in facts["sources"]),
    ]
    shown = Shown(facts["not_anonymised"], facts["masked"])
    if shown.not_anonymised:
        lines.append(f"  look at: {shown.describe()}")
    return "\n".join(lines)


def _describe_source(source: dict[str, Any]) -> str:
    anonymised = "" if source["anonymised"] else ", not anonymised"
    return (
        f"  {source['captures']} captures by {source['attribution']}, "
        f"{source['licence']}{anonymised}"
    )


def _contacts(city: City, views: Views, frames) -> UInt8[np.ndarray, "_ _ 3"]:
    import cv2

    chosen = np.linspace(0, len(views) - 1, min(CONTACTS, len(views))).round()
    pictures = []
    for k in np.unique(chosen.astype(int)).tolist():
        frame, capture = frames[k], int(views.captures[k])
        size = (CONTACT_WIDTH, round(CONTACT_WIDTH * frame.shape[0] / frame.shape[1]))
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        text = f"pose {views.frame[k]:.0f}  drive {city.captures.drive[capture]}  "
        text += f"{views.distance_m[k]:.1f} m  {_day_of(city, capture)}"
        pictures.append(report.label(small, text))
    return report.sheet(pictures, columns=4)


def _draw_path(city: City, ecef_from_camera, views: Views, path: Path) -> None:
    route_m = inventory.east_north(city, ecef_from_camera[:, :3, 3])
    places_m = inventory.east_north(city, city.index.position_m[views.captures])
    drives = city.captures.drive[views.captures]
    _, first = np.unique(drives, return_index=True)
    shown = {}
    for k in np.sort(first).tolist():
        name = f"drive {drives[k]}, {_day_of(city, int(views.captures[k]))}"
        shown[name] = places_m[drives == drives[k]]
    report.draw_route(path, _drives(city), route_m, shown)


def _drives(city: City, most: int = 200_000) -> list[np.ndarray]:
    """Give the drives' lines for a map, with fewer points where a city is large."""
    every = max(1, len(city) // most)
    places_m = inventory.east_north(city, city.index.position_m)
    edges = city.index.drive_edges
    pairs = zip(edges[:-1], edges[1:], strict=True)
    return [places_m[a:b:every] for a, b in pairs]


def _pair_places(city: City, pairs: Pairs | None) -> Float64[np.ndarray, "p 2"]:
    if pairs is None:
        return np.zeros((0, 2))
    return inventory.east_north(city, city.index.position_m[pairs.start_a])


def _day_of(city: City, capture: int) -> str:
    return _day(float(city.captures.time_s[capture]) / 86400)


def _day(days: float) -> str:
    return str(np.datetime64(int(days), "D"))


COMMAND = Command(__doc__)
COMMAND.needs("--city", help="city folder, as tools/build_city.py writes it")
COMMAND.takes("--path", help="path file, as generate takes it")
COMMAND.makes("--out", help="folder to write to")
COMMAND.takes("--retrieval", choices=WAYS, default=WAYS[0], help="of the views")
COMMAND.takes(
    "--radius-m", type=float, default=Costs.radius_m, help="how far a capture may be"
)
COMMAND.takes("--spacing-m", type=float, default=0.5, help="between poses of the path")
COMMAND.takes("--height", type=int, default=480, help="of the views, pixels")
COMMAND.takes("--width", type=int, default=832, help="of the views, pixels")
COMMAND.takes("--fov-deg", type=float, default=65.0, help="of the views, horizontal")
COMMAND.switch("--rerun", "write path.rrd for the Rerun viewer, too (extra rerun)")
COMMAND.takes("--fps", type=float, default=10.0, help="of conditions.mp4")


def main(given: argparse.Namespace) -> None:
    """Write and print what the city holds, and what it holds along the path."""
    if given.rerun:
        import_rerun()  # before anything takes time
    out = open_folder(given.out)
    city = City(given.city)
    print(describe_city(survey_city(city, out)))
    if given.path:
        poses = read_path(given.path, city, given.spacing_m, given.fps)
        config = ClipConfig(
            height=given.height, width=given.width, fov_deg=given.fov_deg
        )
        kinds = dict(way=given.retrieval, radius_m=given.radius_m, fps=given.fps)
        kinds["rerun"] = given.rerun
        print(describe_path(survey_path(city, poses, config, out, **kinds)))
    print(f"wrote {out}")


if __name__ == "__main__":
    COMMAND.run(main)
