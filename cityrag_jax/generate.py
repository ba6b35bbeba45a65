"""Generate a video from one photo and a path, grounded on a city's panoramas:

    python -m cityrag_jax.generate --config=configs/toy_city.py --checkpoint=DIR \\
        --city=DIR --image=photo.jpg --path=path.geojson --out=DIR
        [--config.sample.key=value ...] [--seed=0] [--without=geo] [--text=text.npy]
        [--speed-m-s=4] [--stops=12:2.5] [--mesh=sequence:4]
    python -m cityrag_jax.generate --config=... --checkpoint=DIR --city=DIR \\
        --jobs=jobs.jsonl --out=DIR [--devices-per-job=1] [--check]

The photo stands at the path's first place and looks along it. The path is a
GeoJSON, GPX or KML line, or a CSV of latitude, longitude and, if known, height. The
video is made in clips, and video.mp4 in OUT grows with each. Killed at any moment, the
same command goes on behind the last whole clip; SIGTERM parks there (exit code 143). In
the end OUT holds video.mp4, conditions.mp4 (the retrieved views), poses.tum (those
asked for), overview.png, map.png and generate.json with all that was used, licences and
attributions of the panoramas among it.

A list of jobs makes many videos, by any number of such commands at once
(`jobs/README.md`); options given beside it hold for its lines that say nothing else.
Exit code 3: some lines cannot be done, status.json in OUT says why. `--check` reads
all that is named, without weights or accelerator.
"""

import argparse
import dataclasses
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from cityrag_jax import report
from cityrag_jax.checkpoint import TRUST, trust
from cityrag_jax.commands import Command, find_shipped
from cityrag_jax.data.store import City
from cityrag_jax.files import open_folder
from cityrag_jax.generator import MESH, open_mesh, split_devices, with_mesh
from cityrag_jax.geo.grounding import GAPS, WAYS
from cityrag_jax.jobs.check import check_jobs, describe_check, summarise
from cityrag_jax.jobs.folder import JobsFolder
from cityrag_jax.jobs.lines import read_lines
from cityrag_jax.jobs.run import Model, run_jobs, say
from cityrag_jax.parallel import (
    DISTRIBUTED,
    initialise,
    is_writer,
    keep_compilations,
)
from cityrag_jax.recording import VIDEO
from cityrag_jax.request import Order, doubt_speed, generate_into, read_request
from cityrag_jax.rollout import Job, MadeClip

PARKED, SOME_FAILED = 128 + signal.SIGTERM, 3


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
    return Order(**{name: getattr(given, name) for name in names})


def check_given(given: argparse.Namespace) -> None:
    """Raise ValueError for options that lack, or that do not go together."""
    of_one, of_many = ("image", "path", "script", "photo_pose"), ("devices_per_job",)
    of_many += ("seconds_per_step", "check", "independent")
    if given.independent and given.distributed:
        raise ValueError("--independent or --distributed: alone or joined, not both.")
    if not given.checkpoint and not given.check:
        raise ValueError("--checkpoint must be given: a model folder or workdir.")
    wrong = of_one if given.jobs else of_many
    wrong = [f"--{n.replace('_', '-')}" for n in wrong if getattr(given, n)]
    if wrong and given.jobs:
        raise ValueError(f"{', '.join(wrong)}: of one video; write it in the list.")
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: of a list of videos; give --jobs.")
    if not given.jobs:
        read_order(given).check()


IMAGE = "photo at the path's first place, JPEG or PNG"
JOBS = "a list of videos to make, a JSON object a line, instead of image and path"
DEVICES = "share this process's devices out to jobs, so many each"
STEP = "what a solver step of a clip takes, for the device hours of --check"
BURN = "name the panoramas' owners in the video's pictures, not in its metadata alone"
INDEPENDENT = "take jobs for oneself, even where a launcher started several processes"
CHECK = "read the whole list and say what would be wrong with it, and make nothing"
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
COMMAND.needs("--city", help="city folder, as tools/build_city.py writes it")
COMMAND.makes("--out", help="folder to write to")
COMMAND.takes("--checkpoint", default="", help="model folder or training workdir")
COMMAND.takes("--image", default="", help=IMAGE)
COMMAND.takes("--path", default="", help=PATH)
COMMAND.takes("--script", default="", metavar="WORDS", help=SCRIPT)
COMMAND.takes("--jobs", default="", metavar="FILE.jsonl", help=JOBS)
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
COMMAND.switch("--burn-attribution", BURN)
COMMAND.takes("--mesh", metavar="AXIS:SIZE", help=MESH)
COMMAND.takes("--devices-per-job", type=int, help=DEVICES)
COMMAND.takes("--seconds-per-step", type=float, help=STEP)
COMMAND.switch("--check", CHECK)
COMMAND.switch("--independent", INDEPENDENT)
COMMAND.switch("--distributed", DISTRIBUTED)
COMMAND.switch("--trust", TRUST)


def main(given: argparse.Namespace) -> int:
    """Check the inputs, generate, and write the results."""
    check_given(given)
    if given.check:
        return check_list(given)
    logging.set_verbosity(logging.WARNING)
    keep_compilations()
    initialise(given.distributed, alone=given.independent)
    parking = Parking()  # behind that: joined processes would get JAX's own handler
    trust(given.trust)
    return (make_list if given.jobs else make_one)(given, parking)


def make_one(given: argparse.Namespace, stopped: Callable[[], bool]) -> int:
    """Make one video; give the exit code."""
    open_folder(given.out)
    config, order = with_mesh(given.config, given.mesh), read_order(given)
    city, checkpoint = City(given.city), find_shipped(given.checkpoint)
    request = read_request(order, config, checkpoint, city)
    doubt = doubt_speed(order, city, config.sample)
    if doubt and is_writer():
        print(f"warning: {doubt}", file=sys.stderr)
    facts = dataclasses.asdict(order)
    facts |= {"checkpoint": str(given.checkpoint), "jax": jax.__version__}
    facts |= {"without": list(request.without), "config": json.loads(config.to_json())}
    kinds = dict(on_clip=say_clip, stopped=stopped, facts=facts)
    whole = generate_into(given.out, request, **kinds)
    if whole:
        say(f"wrote {Path(given.out, VIDEO)}")
        return 0
    say(f"parked in {given.out}; the same command goes on")
    return PARKED


def make_list(given: argparse.Namespace, stopped: Callable[[], bool]) -> int:
    """Make the videos of a list; give the exit code."""
    lines = read_lines(given.jobs, read_order(given))
    config, city = with_mesh(given.config, given.mesh), City(given.city)
    sizes, checkpoint = dict(config.sample.mesh), find_shipped(given.checkpoint)
    if given.devices_per_job is None:
        meshes = [open_mesh(sizes)]
    else:
        meshes = split_devices(sizes, given.devices_per_job)
    models = [Model(config, checkpoint, city, mesh) for mesh in meshes]
    folder = JobsFolder(given.out, lines, models[0].made_by())
    whole = run_jobs(folder, models, stopped)
    failed = sum(folder.outcome(line) == "failed" for line in lines)
    if not whole:
        say(f"parked in {given.out}; the same command goes on")
        return PARKED
    say(f"{len(lines) - failed} of {len(lines)} videos are in {folder.videos}")
    return SOME_FAILED if failed else 0


def check_list(given: argparse.Namespace) -> int:
    """Say what a list holds and what is wrong with it; give the exit code."""
    jax.config.update("jax_platforms", "cpu")
    lines = read_lines(given.jobs, read_order(given))
    config, city = with_mesh(given.config, given.mesh), City(given.city)
    checked, size_bytes = check_jobs(lines, Model(config, Path(), city))
    devices = given.devices_per_job or math.prod(map(abs, config.sample.mesh.values()))
    kinds = dict(seconds_per_step=given.seconds_per_step, devices=devices)
    summary = summarise(checked, size_bytes, **kinds)
    out = open_folder(given.out)
    report.write_text(out / "check.json", json.dumps(summary, indent=1) + "\n")
    print(describe_check(checked, summary))
    return SOME_FAILED if summary["bad"] else 0


if __name__ == "__main__":
    COMMAND.run(main)
