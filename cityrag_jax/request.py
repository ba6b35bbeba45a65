"""A video that is wanted, from the words of a command line to a folder of results.

An `Order` is what a person typed: files and options. `read_request` reads it into a
`Request`: pixels and poses. `generate` gives its clips, `generate_into` a folder that
survives kills. One video's door and lists of jobs stand on these alike.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, Float64, UInt8
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import identify_model
from cityrag_jax.data.inventory import driven_spacing_m
from cityrag_jax.data.paths import lay_script, read_path
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image
from cityrag_jax.generator import Generator, open_generator, open_mesh
from cityrag_jax.geo.grounding import GAPS, WAYS, Retrieval
from cityrag_jax.geo.photo import (
    PhotoPose,
    level_photo,
    parse_photo_pose,
    start_at_photo,
)
from cityrag_jax.geo.trajectory import insert_stops
from cityrag_jax.importers.tags import read_tags
from cityrag_jax.parallel import any_process
from cityrag_jax.recording import Recording, digest
from cityrag_jax.rollout import Job, MadeClip, plan_job, rollout
from cityrag_jax.sampling import read_sampler
from cityrag_jax.training.examples import clip_config

EXIF = "exif"  # a photo pose that the photo tells itself
MOST_ENLARGED = 16  # times; a photo of few pixels shows nothing of any street


@dataclasses.dataclass(frozen=True)
class Order:
    """What is asked for of one video, as it is typed.

    `path` is a file or empty, and then `script` holds the path in words
    (`geo.script`). `stops`, `without` and `photo_pose` are those of the command line.
    """

    image: str
    path: str = ""
    script: str = ""
    seed: int = 0
    photo_pose: str = ""
    speed_m_s: float | None = None
    stops: str = ""
    without: str = ""
    text: str = ""
    retrieval: str = WAYS[0]
    gaps: str = GAPS[0]
    burn_attribution: bool = False

    def check(self) -> None:
        """Raise ValueError for what lacks or cannot be, before a file is read."""
        if not self.image:
            raise ValueError("An image is needed: the photo at the path's first place.")
        if bool(self.path) == bool(self.script):
            both = f"path is {self.path!r} and script {self.script!r}"
            raise ValueError(f"Give a path or a script, one of them; {both}.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"Seed {self.seed} must be from 0 to 2^64 - 1.")


@dataclasses.dataclass(frozen=True)
class Request:
    """A video that is wanted: of what photo, along which poses, by what model.

    `without` leaves out "pose" or "geo"; `text` holds the rows of a prompt in the place
    of the checkpoint's; `way` and `gaps` are those of `geo.grounding.Retrieval`;
    `weights` is the checkpoint's digest, where it is known already; `burn` has the
    panoramas' owners named in the video's pictures.
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
    weights: str = ""
    burn: bool = False

    @functools.cached_property
    def job(self) -> Job:
        """What every clip will be conditioned on, found once; no model is read."""
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
        solver = ("num_steps", "shift", "guidance", "scales", "guided")
        solver += ("preset", "ratios")
        return {
            "weights": self.weights or identify_model(self.checkpoint),
            **{name: self.config.sample[name] for name in solver},
            "vae_dtype": self.config.model.vae_dtype,
            "without": list(self.without),
            "text": None if self.text is None else digest(self.text),
        }


def generate(request: Request) -> Iterator[MadeClip]:
    """Generate a frame for every pose, clip by clip as they are asked for.

    Raises ValueError at once for whatever cannot be generated.
    """
    job = request.job  # before the model is read
    return rollout(request.open(), job)


def generate_into(
    out: Path | str,
    request: Request,
    *,
    opened: Callable[[Request], Generator] = Request.open,
    on_clip: Callable[[Job, MadeClip], None] = lambda job, made: None,
    stopped: Callable[[], bool] = lambda: False,
    facts: dict[str, Any] | None = None,
) -> bool:
    """Generate into a folder, going on behind the last clip that is whole there.

    The model is `opened` only where a clip is missing. `on_clip` gets every new clip
    once it is on the disk. When `stopped` says so after a
    clip, the rest is left to another call with the same request. Says whether the video
    is whole. `facts` join those of generate.json.
    """
    job, fps = request.job, float(request.config.sample.fps)
    kinds = dict(fps=fps, burn=request.burn)
    with Recording(out, job, request.identity(), **kinds) as recording:
        if recording.count < len(job.spans):
            if any_process(np.array([stopped()]))[0]:
                return False
            start, last_frame = recording.count, recording.last_frame()
            clips = rollout(opened(request), job, start=start, last_frame=last_frame)
            for made in clips:
                recording.add(made)
                on_clip(job, made)
                if any_process(np.array([stopped()]))[0] and recording.count < len(
                    job.spans
                ):
                    return False
        recording.finish(facts or {})
    return True


def fit_photo(
    photo: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Cut the middle of a photo to the video's shape and resample it.

    Means over areas when shrinking, the reference's cubic kernel when enlarging. Raises
    ValueError if it would be enlarged more than `MOST_ENLARGED` times.
    """
    h, w, _ = photo.shape
    keep_h = min(h, max(1, round(w * height / width)))
    keep_w = min(w, max(1, round(h * width / height)))
    if height > MOST_ENLARGED * keep_h or width > MOST_ENLARGED * keep_w:
        raise ValueError(
            f"The photo has {w}x{h} pixels, too few for a video of {width}x{height}: "
            f"give one of at least {-(-width // MOST_ENLARGED)}x"
            f"{-(-height // MOST_ENLARGED)}, better of the video's size."
        )
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


def read_stops(text: str) -> list[tuple[float, float]]:
    """Read stops such as "12:2.5,40:5": metres along the path, and seconds."""
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return [(float(at_m), float(time_s)) for at_m, time_s in pairs]
    except ValueError:
        raise ValueError(
            f"--stops={text}: write metres:seconds, such as --stops=12:2.5,40:5."
        ) from None


def frame_spacing_m(order: Order, sample: ConfigDict) -> float:
    """Give the metres between two frames, at the speed asked for or the config's."""
    for name in ("fps", "spacing_m"):
        if not 0 < sample[name] < 1000:
            raise ValueError(f"sample.{name} is {sample[name]}; give one above 0.")
    if order.speed_m_s is None:
        return float(sample.spacing_m)
    if not 0 < order.speed_m_s < 1000:
        raise ValueError(
            f"--speed-m-s={order.speed_m_s:g}: give metres a second above 0; "
            "--stops lets the camera stand."
        )
    return order.speed_m_s / float(sample.fps)


def doubt_speed(order: Order, city: City, sample: ConfigDict) -> str:
    """Say if nobody drove the city at this speed; empty where somebody did."""
    fps, spacing_m = float(sample.fps), frame_spacing_m(order, sample)
    low, high = driven_spacing_m(city)
    if 0.9 * low <= spacing_m <= 1.1 * high:
        return ""
    middle = (low + high) / 2 * fps
    return (
        f"{spacing_m:.2f} m between frames ({spacing_m * fps:.1f} m/s); drives of "
        f"{city.name} went {low:.2f} to {high:.2f} m, and a model trained on such "
        f"knows no other. Try --speed-m-s={middle:.1f}."
    )


def read_poses(
    order: Order, city: City, sample: ConfigDict
) -> Float64[np.ndarray, "N 4 4"]:
    """Read the path at the speed asked for, with its stops."""
    fps, spacing_m = float(sample.fps), frame_spacing_m(order, sample)
    if order.script:
        poses = lay_script(order.script, city, spacing_m, fps)
    else:
        poses = read_path(order.path, city, spacing_m, fps)
    return insert_stops(poses, spacing_m, fps, read_stops(order.stops))


def read_photo_pose(order: Order) -> PhotoPose:
    """Read where the photo was taken and looked, of what was given or of its tags."""
    if order.photo_pose != EXIF:
        return parse_photo_pose(order.photo_pose)
    tags = read_tags(Path(order.image))
    missing = [
        name
        for name in ("latitude_deg", "longitude_deg", "heading_deg")
        if np.isnan(getattr(tags, name))
    ]
    if missing:
        raise ValueError(
            f"{order.image} does not tell its {', '.join(missing)} in EXIF or GPano "
            "tags; give --photo-pose=LAT,LON,HEADING[,PITCH[,FOV]]."
        )
    return PhotoPose(
        tags.latitude_deg,
        tags.longitude_deg,
        tags.heading_deg,
        float(np.nan_to_num(tags.pitch_deg)),
        None if np.isnan(tags.fov_deg) else tags.fov_deg,
    )


def read_request(
    order: Order, config: ConfigDict, checkpoint: Path | str, city: City
) -> Request:
    """Read the files of an order; ValueError for what is wrong with them."""
    photo, poses = read_image(order.image), read_poses(order, city, config.sample)
    if order.photo_pose:
        clips, pose = clip_config(config.data), read_photo_pose(order)
        photo = level_photo(photo, pose, clips.height, clips.width, clips.fov_deg)
        poses = start_at_photo(poses, pose)
    return Request(
        config,
        checkpoint,
        city,
        photo,
        poses,
        seed=order.seed,
        without=tuple(name for name in order.without.split(",") if name),
        text=read_text(order.text) if order.text else None,
        way=order.retrieval,
        gaps=order.gaps,
        burn=order.burn_attribution,
    )
