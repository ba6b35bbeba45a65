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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from absl import logging
from jaxtyping import Float32, Float64, UInt8
from ml_collections import ConfigDict

from cityrag_jax import report
from cityrag_jax.checkpoint import TRUST, identify_model, trust
from cityrag_jax.commands import Command, find_shipped
from cityrag_jax.data.inventory import driven_spacing_m
from cityrag_jax.data.paths import read_path
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image
from cityrag_jax.generator import (
    MESH,
    Generator,
    open_generator,
    open_mesh,
    with_mesh,
)
from cityrag_jax.geo.grounding import GAPS, WAYS, Retrieval
from cityrag_jax.geo.photo import level_photo, parse_photo_pose, start_at_photo
from cityrag_jax.geo.trajectory import insert_stops
from cityrag_jax.parallel import (
    DISTRIBUTED,
    any_process,
    initialise,
    is_writer,
    keep_compilations,
)
from cityrag_jax.recording import VIDEO, Recording, digest
from cityrag_jax.rollout import Job, MadeClip, plan_job, rollout
from cityrag_jax.sampling import read_sampler
from cityrag_jax.training.examples import clip_config


def fit_photo(
    photo: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Cut the middle of a photo to the video's shape and resample it.

    Means over areas when shrinking, the reference's cubic kernel when enlarging.
    """
    h, w, _ = photo.shape
    keep_h = min(h, max(1, round(w * height / width)))
    keep_w = min(w, max(1, round(h * width / height)))
    top, left = (h - keep_h) // 2, (w - keep_w) // 2
    middle = photo[top : top + keep_h, left : left + keep_w]
    shrinks = keep_h > height
    kind = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(middle, (width, height), interpolation=kind)


def read_text(path: Path | str) -> Float32[np.ndarray, "S E"]:
    """Read the rows of a prompt, as tools/encode_prompt.py writes them."""
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); write it by tools/encode_prompt.py."
        ) from error
    if rows.ndim != 2 or rows.dtype != np.float32:
        raise ValueError(
            f"{path} holds {rows.dtype} of {rows.shape}, not float32 rows of a prompt."
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Request:
    """A video that is wanted: of what photo, along which poses, by what model.

    `without` leaves out "pose" or "geo"; `text` holds the rows of a prompt in the place
    of the checkpoint's; `way` and `gaps` are those of `geo.grounding.Retrieval`.
    """

    config: ConfigDict
    checkpoint: Path | str
    city: City
    photo: UInt8[np.ndarray, "h w 3"]
    ecef_from_camera: Float64[np.ndarray, "N 4 4"]
    seed: int = 0
    without: tuple[str, ...] = ()
    text: Float32[np.ndarray, "S E"] | None = None
    way: str = WAYS[0]
    gaps: str = GAPS[0]

    def plan(self) -> Job:
        """Find what every clip will be conditioned on; no model is read."""
        read_sampler(self.config.sample, self.without)
        clips = clip_config(self.config.data)
        return plan_job(
            self.city,
            fit_photo(self.photo, clips.height, clips.width),
            self.ecef_from_camera,
            clips,
            seed=self.seed,
            retrieval=Retrieval(self.way, self.gaps, self.config.sample.radius_m),
        )

    def open(self) -> Generator:
        """Open the model on the config's mesh."""
        mesh = open_mesh(dict(self.config.sample.mesh))
        kinds = dict(mesh=mesh, without=self.without, text=self.text)
        kinds["cities"] = [self.city]
        return open_generator(self.config, self.checkpoint, **kinds)

    def identity(self) -> dict[str, Any]:
        """Say what decides about the video's pixels besides the job."""
        solver = ("num_steps", "shift", "guidance", "scales", "preset", "ratios")
        return {
            "weights": identify_model(self.checkpoint),
            **{name: self.config.sample[name] for name in solver},
            "vae_dtype": self.config.model.vae_dtype,
            "without": list(self.without),
            "text": None if self.text is None else digest(self.text),
        }


def generate(request: Request) -> Iterator[MadeClip]:
    """Generate a frame for every pose, clip by clip as they are asked for.

    Raises ValueError at once for whatever cannot be generated.
    """
    job = request.plan()
    return rollout(request.open(), job)


def generate_into(
    out: Path | str,
    request: Request,
    *,
    on_clip: Callable[[Job, MadeClip], None] = lambda job, made: None,
    stopped: Callable[[], bool] = lambda: False,
    facts: dict[str, Any] | None = None,
) -> bool:
    """Generate into a folder, going on behind the last clip that is whole there.

    `on_clip` gets every new clip once it is on the disk. When `stopped` says so after a
    clip, the rest is left to another call with the same request. Says whether the video
    is whole. `facts` join those of generate.json.
    """
    job, fps = request.plan(), float(request.config.sample.fps)
    with Recording(out, job, request.identity(), fps=fps) as recording:
        if recording.count < len(job.spans):
            if any_process(np.array([stopped()]))[0]:
                return False
            start, last_frame = recording.count, recording.last_frame()
            clips = rollout(request.open(), job, start=start, last_frame=last_frame)
            for made in clips:
                recording.add(made)
                on_clip(job, made)
                if any_process(np.array([stopped()]))[0] and recording.count < len(
                    job.spans
                ):
                    return False
        recording.finish(facts or {})
    return True


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


def read_stops(text: str) -> list[tuple[float, float]]:
    """Read stops such as "12:2.5,40:5": metres along the path, and seconds."""
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return [(float(at_m), float(time_s)) for at_m, time_s in pairs]
    except ValueError:
        raise ValueError(
            f"--stops={text}: write metres:seconds, such as --stops=12:2.5,40:5."
        ) from None


def read_poses(given: argparse.Namespace, city: City) -> Float64[np.ndarray, "N 4 4"]:
    """Read the path at the speed asked for, with its stops.

    Warns of a speed at which nobody drove the city: on it, models know no such clips.
    """
    sample = given.config.sample
    fps, spacing_m = float(sample.fps), float(sample.spacing_m)
    if given.speed_m_s is not None:
        spacing_m = given.speed_m_s / fps
    poses = read_path(given.path, city, spacing_m, fps)
    low, high = driven_spacing_m(city)
    middle = (low + high) / 2 * fps
    if not 0.9 * low <= spacing_m <= 1.1 * high and is_writer():
        print(
            f"warning: {spacing_m:.2f} m between frames ({spacing_m * fps:.1f} m/s); "
            f"drives of {city.name} went {low:.2f} to {high:.2f} m, and a model "
            f"trained on such knows no other. Try --speed-m-s={middle:.1f}.",
            file=sys.stderr,
        )
    return insert_stops(poses, spacing_m, fps, read_stops(given.stops))


def read_request(given: argparse.Namespace) -> Request:
    """Read what the command line names."""
    config = with_mesh(given.config, given.mesh)
    city = City(given.city)
    photo, poses = read_image(given.image), read_poses(given, city)
    if given.photo_pose is not None:
        clips, pose = clip_config(config.data), parse_photo_pose(given.photo_pose)
        photo = level_photo(photo, pose, clips.height, clips.width, clips.fov_deg)
        poses = start_at_photo(poses, pose)
    return Request(
        config,
        find_shipped(given.checkpoint),
        city,
        photo,
        poses,
        seed=given.seed,
        without=tuple(name for name in given.without.split(",") if name),
        text=None if given.text is None else read_text(given.text),
        way=given.retrieval,
        gaps=given.gaps,
    )


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
COMMAND.needs("--path", help="line as .geojson, .gpx, .kml or .csv of lat,lon")
COMMAND.needs("--out", help="folder to write to")
COMMAND.takes(
    "--seed", type=int, default=0, help="of the noise; equal seeds, equal bytes"
)
COMMAND.takes("--photo-pose", metavar="LAT,LON,HEADING[,PITCH[,FOV]]", help=PHOTO)
COMMAND.takes("--speed-m-s", type=float, help=SPEED)
COMMAND.takes("--stops", default="", metavar="METRES:SECONDS,...", help=STOPS)
COMMAND.takes("--without", default="", help="conditions to leave out: pose, geo")
COMMAND.takes("--text", help="another prompt's rows, by tools/encode_prompt.py")
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
    request = read_request(given)
    named = ("image", "path", "checkpoint", "text", "seed", "retrieval", "gaps")
    named += ("speed_m_s", "stops", "photo_pose")
    facts = {name: getattr(given, name) for name in named}
    facts |= {"without": list(request.without), "jax": jax.__version__}
    facts["config"] = json.loads(request.config.to_json())
    kinds = dict(on_clip=say_clip, stopped=parking, facts=facts)
    whole = generate_into(given.out, request, **kinds)
    if is_writer() and whole:
        print(f"wrote {Path(given.out, VIDEO)}")
    elif is_writer():
        print(f"parked in {given.out}; the same command goes on")
    return 0 if whole else 128 + signal.SIGTERM


if __name__ == "__main__":
    COMMAND.run(main)
