"""Videos of a 360-degree camera, and the track of a satellite receiver, as a recording.

Videos are equirectangular, as cameras' own programs export them. Frames are taken by
distance along the track, so that standing costs nothing and speed does not matter. When
a video began is its creation time and an offset of that clock; not given, the offset is
found where the speed seen in the pictures fits the track's best.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from cityrag_jax.data.store import City
from cityrag_jax.data.video import frames_at, read_frames, read_times
from cityrag_jax.data.writing import check_free
from cityrag_jax.geo.ecef import ecef_from_geodetic
from cityrag_jax.geo.pose_files import Placements, parse_placements, place_at_times
from cityrag_jax.importers.cities import Load, Making, Recording, Sphere, make_city
from cityrag_jax.importers.folder import ROUND, TRACK_GAP_S
from cityrag_jax.importers.recordings import Origin, Shots
from cityrag_jax.progress import Progress

FILMS = (".mp4", ".mov", ".mkv")
SPACING_M = 0.5  # of frames, where none is asked for: about 10 a second in a town
GRID_S = 0.25  # of speeds that are compared
SMOOTH_S = 1.0  # over which a track's speed is taken
SURE, CLEAR = 0.6, 0.1  # least correlation, and how far it must be above any other
APART_S = 3.0  # from which on a shift is another one
HEIGHT = 96  # of the pictures that motion is seen in


@dataclasses.dataclass(frozen=True)
class Source:
    """One video or a folder of them, the track, and whose they are.

    `clock_s` is added to the videos' own times (from 1970 on where one tells none);
    None finds it, for each video by itself.
    """

    films: Path
    track: Path
    origin: Origin
    clock_s: float | None = None


def import_film(
    source: Source, making: Making, out: Path, *, overwrite: bool = False
) -> tuple[City, dict[str, Any]]:
    """Write a city from videos; give it, and the report of import.json."""
    check_free(out, overwrite or making.append)
    text = source.track.read_text(encoding="utf-8-sig")
    track = parse_placements(text, source.track.name)
    if track.names is not None or np.isnan(track.time_s).any():
        raise ValueError(f"{source.track} has no times; give a GPX track with times.")
    films = find_films(source.films)
    spacing_m = making.cuts.spacing_m or SPACING_M
    parts, notes, skipped = [], [], {}
    for name, path in films.items():
        start_s, time_s = read_times(path)
        _check_sphere(path)
        told_s = 0.0 if np.isnan(start_s) else start_s
        offset_s = source.clock_s
        if offset_s is None:
            offset_s, sure = find_clock(path, time_s, track, told_s)
            notes.append(
                f"{name} began {offset_s:+.2f} s after its clock says ({sure})"
            )
        places = place_at_times(track, told_s + offset_s + time_s, TRACK_GAP_S)
        rows = frames_by_distance(places, spacing_m)
        if lost := int(np.isnan(places["latitude_deg"]).sum()):
            skipped[f"{lost} frames outside of the track or in its gaps"] = [name]
        if len(rows):
            parts.append((name, path, time_s[rows], told_s + offset_s, places, rows))
    if not parts:
        raise ValueError(
            f"No frame of {source.films} was taken during {source.track}: the track "
            f"runs from {_date(track.time_s.min())} to {_date(track.time_s.max())}. "
            "Give --clock-offset-s, or none to find it."
        )
    notes.append(f"frames taken every {spacing_m:g} m along the track")
    recording = _record(parts, source.origin, notes, skipped)
    recording = dataclasses.replace(recording, spacing_m=spacing_m)
    cuts = dataclasses.replace(making.cuts, spacing_m=0.0)  # thinned they are
    making = dataclasses.replace(making, cuts=cuts)
    return make_city(recording, making, out, overwrite=overwrite)


def find_films(path: Path) -> dict[str, Path]:
    """Give videos by name: a file, or all of a folder."""
    paths = [path] if path.is_file() else sorted(path.rglob("*"))
    found = {p.stem: p for p in paths if p.suffix.lower() in FILMS}
    if not found:
        raise ValueError(f"{path} holds no video; give {', '.join(FILMS)}.")
    return found


def _check_sphere(path: Path) -> None:
    height, width, _ = next(read_frames(path)).shape
    if abs(width / height - 2) > 2 * ROUND:
        raise ValueError(
            f"{path} is {width}x{height}: no panorama, which is twice as wide as high. "
            "Export it equirectangular with the camera's program."
        )


def frames_by_distance(places: dict[str, np.ndarray], spacing_m: float) -> np.ndarray:
    """Give the frames that lie `spacing_m` behind each other along the way."""
    known = np.flatnonzero(~np.isnan(places["latitude_deg"]))
    if len(known) == 0:
        return known
    where = (places[name][known] for name in ("latitude_deg", "longitude_deg"))
    place_m = ecef_from_geodetic(*where, np.zeros(len(known)))
    steps_m = np.linalg.norm(np.diff(place_m, axis=0), axis=1)
    along_m = np.concatenate([[0.0], np.cumsum(steps_m)])
    wanted_m = np.arange(0, along_m[-1] + 1e-6, spacing_m)
    return np.unique(known[np.searchsorted(along_m, wanted_m - 1e-6)])


def _record(parts, origin: Origin, notes, skipped) -> Recording:
    names, columns, files = [], [], {}
    for name, path, time_s, start_s, places, rows in parts:
        words = [f"{name}/{row:06d}" for row in rows.tolist()]
        files |= dict(zip(words, ((path, t) for t in time_s.tolist()), strict=True))
        names += words
        where = [places[k][rows] for k in ("latitude_deg", "longitude_deg", "height_m")]
        unknown = np.full(len(rows), np.nan)
        columns.append([start_s + time_s, *where, unknown, unknown, unknown])
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    shots = Shots(tuple(names), *joined, (origin,) * len(names))
    sizes = {path: next(read_frames(path)).shape[0] for path, _ in files.values()}
    spheres = [Sphere(0.0, 0.0, sizes[files[name][0]]) for name in names]
    load = functools.partial(_load, files)
    return Recording("video", shots, spheres, load, notes, skipped)


def _load(files: dict[str, tuple[Path, float]], names: list[str]) -> Iterator[Load]:
    """Decode each video once, in order, from the first frame that is wanted."""
    by_film: dict[Path, list[float]] = {}
    for name in names:
        path, time_s = files[name]
        by_film.setdefault(path, []).append(time_s)
    for path, times in by_film.items():
        for frame in frames_at(path, np.array(times)):
            yield functools.partial(_same, frame)


def _same(frame: np.ndarray) -> np.ndarray:
    return frame


def find_clock(
    path: Path, time_s: Float64[np.ndarray, " n"], track: Placements, told_s: float
) -> tuple[float, str]:
    """Give the seconds that a video's clock is behind the track's, and how sure it is.

    ValueError if its motion fits the track nowhere, or in several places.
    """
    seen = watch_motion(path, time_s)
    begin_s, speed = track_speed(track)
    edge = len(seen) // 10  # of a video that begins before the track, or ends after it
    fits = _correlate(np.log1p(np.pad(speed, edge)), np.log1p(seen))
    if len(fits) == 0:
        raise ValueError(
            f"{path} lasts {time_s[-1]:.0f} s, longer than its track: give the whole "
            "track, or --clock-offset-s."
        )
    best = int(np.argmax(fits))
    far = np.abs(np.arange(len(fits)) - best) * GRID_S > APART_S
    other = float(fits[far].max()) if far.any() else -1.0
    if fits[best] < SURE or fits[best] - other < CLEAR:
        raise ValueError(
            f"{path}: its motion fits the track's speed by {fits[best]:.2f} at best "
            f"and {other:.2f} elsewhere, too little to tell when it began (one that "
            "drives evenly does not tell). Give --clock-offset-s: 0 trusts its clock."
        )
    start_s = begin_s + (best - edge + _peak(fits, best)) * GRID_S
    sure = f"correlation {fits[best]:.2f}, elsewhere at most {other:.2f}"
    return float(start_s - told_s), sure


def watch_motion(
    path: Path, time_s: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " m"]:
    """See how fast a camera moves, in no unit, every `GRID_S` from the first frame.

    Optical flow along the horizon from a frame to the next. Turning shifts all columns
    alike and is taken away; what is left grows with speed.
    """
    grid = np.arange(0, time_s[-1] - time_s[0], GRID_S) + time_s[0]
    first = np.clip(np.searchsorted(time_s, grid - 1e-6), 0, len(time_s) - 2)
    wanted = np.unique(np.concatenate([first, first + 1]))
    frames = frames_at(path, time_s[wanted])
    small: dict[int, np.ndarray] = {}
    motion = np.zeros(len(grid))
    with Progress(f"watching {path.name}", len(wanted), "frame") as bar:
        for row, frame in zip(wanted.tolist(), frames, strict=True):
            bar.update()
            small[row] = _grey(frame)
            before = small.pop(row - 1, None)
            if before is not None:
                gap_s = time_s[row] - time_s[row - 1]
                motion[first == row - 1] = _flow(before, small[row]) / gap_s
    return motion


def _grey(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W"]:
    size = (2 * HEIGHT, HEIGHT)
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)[HEIGHT // 4 : -HEIGHT // 4]


def _flow(before: np.ndarray, after: np.ndarray) -> float:
    flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    across = flow[..., 0]
    return float(np.mean(np.abs(across - np.median(across))))


def track_speed(track: Placements) -> tuple[float, Float64[np.ndarray, " m"]]:
    """Give the beginning of a track and its speed in m/s, every `GRID_S` from there."""
    begin_s, end_s = float(track.time_s.min()), float(track.time_s.max())
    grid = np.arange(begin_s, end_s, GRID_S)

    def places_m(times: np.ndarray) -> np.ndarray:
        places = place_at_times(track, np.clip(times, begin_s, end_s), np.inf)
        where = (places["latitude_deg"], places["longitude_deg"])
        return ecef_from_geodetic(*where, np.zeros(len(times)))

    half_s = SMOOTH_S / 2
    moved_m = places_m(grid + half_s) - places_m(grid - half_s)
    return begin_s, np.linalg.norm(moved_m, axis=1) / SMOOTH_S


def _correlate(long: np.ndarray, short: np.ndarray) -> Float64[np.ndarray, " s"]:
    """Give the correlation of `short` with every equally long part of `long`."""
    from scipy.signal import correlate

    count = len(short)
    if len(long) < count or np.std(short) < 1e-9:
        return np.zeros(0 if len(long) < count else len(long) - count + 1)
    sums = np.cumsum(np.concatenate([[0.0], long]))
    squares = np.cumsum(np.concatenate([[0.0], long**2]))
    mean = (sums[count:] - sums[:-count]) / count
    spread = np.sqrt(
        np.maximum((squares[count:] - squares[:-count]) / count - mean**2, 1e-12)
    )
    products = correlate(long, short - short.mean(), mode="valid", method="auto")
    return products / count / spread / short.std()


def _peak(fits: np.ndarray, best: int) -> float:
    """Give where between its neighbours a parabola through the best one is highest."""
    if not 0 < best < len(fits) - 1:
        return 0.0
    left, middle, right = fits[best - 1 : best + 2]
    bend = left - 2 * middle + right
    return 0.0 if bend >= 0 else float(0.5 * (left - right) / bend)


def _date(time_s: float) -> str:
    return str(np.datetime64(int(time_s), "s"))
