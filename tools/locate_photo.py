"""Propose which way a photo looks, by matching it against panoramas near its place.

    python tools/locate_photo.py --city=DIR --image=photo.jpg [--place=LAT,LON] \\
        [--fov-deg=65] [--out=match.jpg]

Place and field of view are those of the photo's tags where they are not given. Prints
the --photo-pose that generate takes; OUT shows the photo beside the view that it was
matched with. Exits with 3 where the panoramas do not agree on a heading.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

from cityrag_jax import report
from cityrag_jax.commands import Command
from cityrag_jax.data import locating
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image, write_image
from cityrag_jax.geo.trajectory import headings
from cityrag_jax.importers.tags import read_tags

UNSURE = 3
COMMAND = Command(__doc__)
COMMAND.needs("--city", type=Path, help="city folder")
COMMAND.needs("--image", type=Path, help="the photo")
COMMAND.takes("--place", metavar="LAT,LON", help="where it was taken; else its tags")
COMMAND.takes("--fov-deg", type=float, help="of the photo, horizontal; else its tags")
COMMAND.takes("--radius-m", type=float, default=15.0, help="how far captures may be")
COMMAND.makes("--out", needed=False, type=Path, help="picture to write: photo and view")


def main(given: argparse.Namespace) -> None:
    """Match, and say what came of it."""
    city, photo, tags = (
        City(given.city),
        read_image(given.image),
        read_tags(given.image),
    )
    place = read_place(given.place) or (tags.latitude_deg, tags.longitude_deg)
    fov_deg = given.fov_deg or tags.fov_deg
    if np.isnan(sum(place)):
        raise ValueError(
            f"{given.image} does not tell its place; give --place=LAT,LON."
        )
    if np.isnan(fov_deg):
        raise ValueError(
            f"{given.image} does not tell its focal length; give --fov-deg."
        )
    found = locating.locate_photo(city, photo, *place, fov_deg, radius_m=given.radius_m)
    told = f"{found.agreeing} pairs of points agree, {found.others} on the next best"
    if given.out and found.capture >= 0:
        draw(given.out, city, photo, found, fov_deg)
    if not found.sure:
        print(f"no heading is sure: {told} ({found.heading_deg:g} degrees)")
        sys.exit(UNSURE)
    pose = (*place, found.heading_deg, found.pitch_deg, fov_deg)
    print(f"--photo-pose={','.join(f'{x:.7g}' for x in pose)}   ({told})")


def read_place(text: str | None) -> tuple[float, float] | None:
    """Read latitude and longitude."""
    if not text:
        return None
    try:
        latitude, longitude = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--place={text}: write latitude,longitude in degrees."
        ) from None
    return latitude, longitude


def draw(
    path: Path, city: City, photo, found: locating.Proposal, fov_deg: float
) -> None:
    """Put the photo beside the view of the capture that has most points of it."""
    height = round(480 * photo.shape[0] / photo.shape[1])
    own = headings(city.captures.ecef_from_camera[[found.capture]])
    view = city.crops(
        np.array([found.capture]),
        np.deg2rad(found.heading_deg) - own,
        height=height,
        width=480,
        fov_deg=fov_deg,
    )
    small = cv2.resize(photo, (480, height), interpolation=cv2.INTER_AREA)
    names = ("photo", f"{found.heading_deg:g} degrees")
    pair = [report.label(*x) for x in zip((small, view[0]), names, strict=True)]
    write_image(path, report.sheet(pair, columns=2))


if __name__ == "__main__":
    COMMAND.run(main)
