"""Path files laid on a city's streets, as camera poses."""

from pathlib import Path

import numpy as np
from jaxtyping import Float64

from cityrag_jax.data.store import City
from cityrag_jax.files import named
from cityrag_jax.geo.camera_files import parse_cameras, place_cameras
from cityrag_jax.geo.ecef import ecef_from_geodetic
from cityrag_jax.geo.matching import fill_heights
from cityrag_jax.geo.path_files import SUFFIXES, parse_path
from cityrag_jax.geo.script import look_around, parse_script
from cityrag_jax.geo.trajectory import poses_on_earth

LONGEST_M = 100_000.0
MOST_POSES = 1_000_000


def read_path(
    path: Path | str, city: City, spacing_m: float, fps: float = 10.0
) -> Float64[np.ndarray, "N 4 4"]:
    """Read a path as camera poses on Earth, one every `spacing_m`.

    A .txt may be a camera script, whose seconds are `fps` poses long. Files of poses
    (`geo/camera_files`) give every frame its own; what is not ECEF in them counts from
    the city's anchor.
    """
    path = Path(path)
    text = path.read_bytes() if _is_array(path) else read_words(path)
    try:
        cameras = parse_cameras(text, path.name)
        if cameras is not None:
            poses = place_cameras(cameras, city.header.anchor, path.name)
            return _checked(poses)
        if path.suffix.lower() == ".txt":
            return lay_script(text, city, spacing_m, fps, path.name)
        return _lay(parse_path(text, path.name), city, spacing_m)
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == ".npy" and path.is_file()


def _checked(poses: Float64[np.ndarray, "N 4 4"]) -> Float64[np.ndarray, "N 4 4"]:
    """Refuse poses that no one means as the frames of a video."""
    steps_m = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    if len(poses) < 2 or len(poses) > MOST_POSES or not steps_m.sum() < LONGEST_M:
        raise ValueError(
            f"{len(poses)} poses, {steps_m.sum() / 1000:,.1f} km; give 2 to "
            f"{MOST_POSES:,} poses, one a frame, within {LONGEST_M / 1000:,.0f} km."
        )
    return poses


def lay_script(
    text: str, city: City, spacing_m: float, fps: float, name: str = "script"
) -> Float64[np.ndarray, "N 4 4"]:
    """Lay a camera script on a city's streets, one pose every `spacing_m`."""
    script = parse_script(text, name)
    poses = _lay(script.corners, city, spacing_m)
    return look_around(poses, script.looks, spacing_m, fps)


def _lay(drawn, city: City, spacing_m: float) -> Float64[np.ndarray, "N 4 4"]:
    _check_length(np.nan_to_num(drawn), spacing_m)  # matching it takes a while
    places = fill_heights(city.index, drawn)
    _check_length(places, spacing_m)
    return poses_on_earth(places, spacing_m)


def _check_length(places: Float64[np.ndarray, "M 3"], spacing_m: float) -> None:
    """Refuse a path that no one means, before its poses fill the memory."""
    points = ecef_from_geodetic(*places.T)
    length_m = float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
    if not length_m < LONGEST_M or length_m > MOST_POSES * spacing_m:
        raise ValueError(
            f"the path is {length_m / 1000:,.0f} km long, at most "
            f"{min(LONGEST_M, MOST_POSES * spacing_m) / 1000:,.0f} km are taken; look "
            "for a point that lies elsewhere, or cut the path."
        )


def read_words(path: Path) -> str:
    """Read a text file in UTF-8 or, as Excel may write it, UTF-16 with its mark."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; give a path as .{', .'.join(SUFFIXES)}, "
            ".txt, .tum or .npy."
        )
    with named(path):
        content = path.read_bytes()
    code = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(code)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); save it as UTF-8.") from error
