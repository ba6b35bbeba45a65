"""Generate a video from one photo and a path, grounded on a city's panoramas:

    python -m cityrag_jax.generate --config=configs/toy_city.py --checkpoint=DIR \\
        --city=DIR --image=photo.jpg --path=path.geojson --out=DIR
        [--config.sample.key=value ...] [--seed=0] [--without=geo] [--text=text.npy]
        [--speed-m-s=4] [--stops=12:2.5] [--mesh=sequence:4]

The photo stands at the path's first place and looks along it. The path is a
GeoJSON, GPX or KML line, or a CSV of latitude, longitude and, if known, height. The
video is made in clips, and video.mp4 in OUT grows with each. Killed at any moment, the
same command goes on behind the last whole clip; SIGTERM parks there (exit code 143). In
the end OUT holds video.mp4, conditions.mp4 (the retrieved views), poses.tum (those
asked for), overview.png, map.png and generate.json with all that was used, licences and
attributions of the panoramas among it.
"""

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path

import jax
from absl import logging

from cityrag_jax import report
from cityrag_jax.checkpoint import TRUST, trust
from cityrag_jax.commands import Command, find_shipped
from cityrag_jax.data.store import City
from cityrag_jax.generator import MESH, with_mesh
from cityrag_jax.geo.grounding import GAPS, WAYS
from cityrag_jax.parallel import (
    DISTRIBUTED,
    initialise,
    is_writer,
    keep_compilations,
)
from cityrag_jax.recording import VIDEO
from cityrag_jax.request import Order, doubt_speed, generate_into, read_request
from cityrag_jax.rollout import Job, MadeClip


def say_clip(job: Job, made: MadeClip) -> None:
    """Print a line about a clip."""
    if is_writer():
        last, total = made.span.end - 1, len(job.ecef_from_camera)
        print(
            f"clip {made.number + 1} of {len(job.spans)}, frame {last + 1} of {total}: "
            f"{made.seconds:.1f} s",
            flush=True,
        )


class Parking:
    """Hears SIGTERM: the video is to be left at its next clip. A second one ends it."""

    def __init__(self):
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, _) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        return self._asked


def read_order(given: argparse.Namespace) -> Order:
    """Take what is asked for of a video off the command line."""
    names = (field.name for field in dataclasses.fields(Order))
    order = Order(**{name: getattr(given, name) for name in names})
    order.check()
    return order


PATH = "line as .geojson, .gpx, .kml or .csv of lat,lon, or words as .txt"
SCRIPT = "the path in words instead: 'start LAT,LON HEADING; forward 30; left 90'"
TEXT = "another prompt's rows, by tools/encode_prompt.py"
PHOTO_POSE = "exif|LAT,LON,HEADING[,PITCH[,FOV]]"
RETRIEVAL = "captures for each pose, or as their drive went, with its stops"
PHOTO = "where the photo was taken and looked; without, it looks along the path"
SPEED = "along the path; what config.sample.spacing_m and fps say if not given"
STOPS = "where along the path the camera stands, and how long"
GAPS_HELP = "where nothing was captured along the path"

COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--checkpoint", help="model folder or training workdir")
COMMAND.needs("--city", help="city folder, as tools/build_city.py writes it")
COMMAND.needs("--image", help="photo at the path's first place, JPEG or PNG")
COMMAND.takes("--path", default="", help=PATH)
COMMAND.takes("--script", default="", metavar="WORDS", help=SCRIPT)
COMMAND.needs("--out", help="folder to write to")
COMMAND.takes(
    "--seed", type=int, default=0, help="of the noise; equal seeds, equal bytes"
)
COMMAND.takes("--photo-pose", default="", metavar=PHOTO_POSE, help=PHOTO)
COMMAND.takes("--speed-m-s", type=float, help=SPEED)
COMMAND.takes("--stops", default="", metavar="METRES:SECONDS,...", help=STOPS)
COMMAND.takes("--without", default="", help="conditions to leave out: pose, geo")
COMMAND.takes("--text", default="", help=TEXT)
COMMAND.takes("--retrieval", choices=WAYS, default=WAYS[0], help=RETRIEVAL)
COMMAND.takes("--gaps", choices=GAPS, default=GAPS[0], help=GAPS_HELP)
COMMAND.takes("--mesh", metavar="AXIS:SIZE", help=MESH)
COMMAND.switch("--distributed", DISTRIBUTED)
COMMAND.switch("--trust", TRUST)


def main(given: argparse.Namespace) -> int:
    """Check the inputs, generate, and write the results."""
    logging.set_verbosity(logging.WARNING)
    keep_compilations()
    parking = Parking()
    initialise(given.distributed)
    trust(given.trust)
    report.open_folder(given.out)
    config, order = with_mesh(given.config, given.mesh), read_order(given)
    city, checkpoint = City(given.city), find_shipped(given.checkpoint)
    request = read_request(order, config, checkpoint, city)
    doubt = doubt_speed(order, city, config.sample)
    if doubt and is_writer():
        print(f"warning: {doubt}", file=sys.stderr)
    facts = dataclasses.asdict(order)
    facts |= {"checkpoint": str(given.checkpoint), "jax": jax.__version__}
    facts |= {"without": list(request.without), "config": json.loads(config.to_json())}
    kinds = dict(on_clip=say_clip, stopped=parking, facts=facts)
    whole = generate_into(given.out, request, **kinds)
    if is_writer() and whole:
        print(f"wrote {Path(given.out, VIDEO)}")
    elif is_writer():
        print(f"parked in {given.out}; the same command goes on")
    return 0 if whole else 128 + signal.SIGTERM


if __name__ == "__main__":
    COMMAND.run(main)
