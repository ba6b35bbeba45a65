"""Go the whole road once, on a laptop with nothing downloaded:

    python -m cityrag_jax.demo --out=out/demo

Builds a toy city on disk, takes a photo on a street at a time when nobody drove there,
draws a path around a corner, retrieves panoramas along it, generates the video with the
shipped weights, scores it, and trains on for two minutes to show the trainer. With
--train-seconds=0 --photo-seeds=5,6,7,8,9 it scores five days instead; with
--train-seconds=0 --path-m=375 the path is a loop of 1,000 frames, scored along it.
"""

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from ml_collections import ConfigDict

from cityrag_jax import report
from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import hush_writers, identify_model
from cityrag_jax.commands import Command, find_shipped, load_config
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.paths import read_path
from cityrag_jax.data.store import City
from cityrag_jax.data.video import write_image
from cityrag_jax.evaluate import FULL, POSE_ALONE, RECOLOURED, score
from cityrag_jax.files import open_folder
from cityrag_jax.generator import Generator, open_generator
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef
from cityrag_jax.geo.grounding import Retrieval
from cityrag_jax.metrics.image import psnr, recolour_condition
from cityrag_jax.parallel import keep_compilations
from cityrag_jax.progress import tracked
from cityrag_jax.recording import Recording
from cityrag_jax.request import fit_photo
from cityrag_jax.rollout import Job, MadeClip, plan_job, rollout
from cityrag_jax.sampling import drop
from cityrag_jax.scores import DECIMALS
from cityrag_jax.toy import drives as toy
from cityrag_jax.toy.build import build_toy_city
from cityrag_jax.toy.walk import CLEAR_DAY, film, sharpest_corner
from cityrag_jax.train import train
from cityrag_jax.training.examples import clip_config

CONFIG = "configs/toy_city.py:demo"
WEIGHTS = "configs/toy_city_weights"
PATH_M = 24.0
STRETCH = 100  # frames of which a long path is scored
PHOTO_SCALE = 4
MADE = "made"  # folder of the generated video
BEHIND = f"behind {FULL}"
# Four neighbourhoods of two streets, each driven twice: one neighbourhood is held out.
PLAN = dict(
    neighbourhoods=2,
    blocks=1,
    block_m=36.0,
    routes=1,
    route_streets=2,
    step_m=(0.35, 0.5),
)


def plan_city(path_m: float) -> toy.CityConfig:
    """Plan a city whose drives are long enough for a path: they go round a block."""
    # Streets are taken 1.4 times as long as the path: rounded corners are shorter.
    streets = max(PLAN["route_streets"], math.ceil(1.4 * path_m / PLAN["block_m"]))
    return toy.city("honolulu", **PLAN | {"route_streets": streets})


def draw_path(
    config: toy.CityConfig, held_out: int, file: Path, path_m: float = PATH_M
) -> None:
    """Write the GeoJSON of a path around the sharpest corner of a neighbourhood."""
    corners = [
        sharpest_corner(drive, path_m)
        for drive in toy.drives(config)
        if drive.neighbourhood == held_out
    ]
    _, enu = max(corners, key=lambda corner: corner[0])
    anchor = ecef_from_enu(config.latitude_deg, config.longitude_deg, config.height_m)
    latitude, longitude, height = geodetic_from_ecef(
        enu @ anchor[:3, :3].T + anchor[:3, 3]
    )
    rows = np.stack([longitude, latitude, height], -1).tolist()
    file.write_text(json.dumps({"type": "LineString", "coordinates": rows}))


@dataclasses.dataclass(frozen=True)
class Take:
    """A photo, what it led to in truth, and the videos made with and without geo."""

    photo: UInt8[np.ndarray, "h w 3"]
    truth: UInt8[np.ndarray, "N H W 3"]
    job: Job
    made: list[MadeClip]
    blind: list[MadeClip]

    def videos(self) -> dict[str, UInt8[np.ndarray, "_ H W 3"]]:
        """Join the clips: the retrieved views, and what was made with and without."""
        return {
            "retrieved": np.concatenate([clip.condition for clip in self.made]),
            "geo + trajectory": np.concatenate([clip.frames for clip in self.made]),
            "trajectory alone": np.concatenate([clip.frames for clip in self.blind]),
        }

    def rows(self) -> dict[str, UInt8[np.ndarray, "_ H W 3"]]:
        """Lay out what was given, what was generated, and the truth."""
        retrieved, made, blind = self.videos().values()
        return {
            "photo": self.job.first_frame[None],
            "retrieved": retrieved,
            "generated, geo + trajectory": made,
            "generated, trajectory alone": blind,
            "truth": self.truth,
        }

    def scored(self) -> dict[str, UInt8[np.ndarray, "N H W 3"]]:
        """Give the videos that are scored: made with and without, and the baseline."""
        views, made, blind = self.videos().values()
        views = views[np.minimum(np.arange(len(self.truth)), len(views) - 1)]
        fitted = np.round(255 * recolour_condition(views, self.job.first_frame))
        return {FULL: made, POSE_ALONE: blind, RECOLOURED: fitted.astype(np.uint8)}

    def scores(self) -> dict[str, dict[str, float]]:
        """Score all frames but the given one, and how far each is behind the first."""
        rows = {}
        for way, video in self.scored().items():
            figures = score(video[None], self.truth[None])
            rows[way] = {name: float(values[0]) for name, values in figures.items()}
            rows[way][BEHIND] = rows[FULL]["PSNR"] - rows[way]["PSNR"]
        return rows


def score_along(
    videos: Mapping[str, UInt8[np.ndarray, "N H W 3"]],
    truth: UInt8[np.ndarray, "N H W 3"],
    stretch: int = STRETCH,
) -> dict[str, dict[str, float]]:
    """Give the mean PSNR of every stretch of frames, the given one not counted."""
    ends = [*range(stretch, len(truth), stretch), len(truth)]
    rows = {}
    for way, video in videos.items():
        frames = psnr(video[1:], truth[1:])
        parts = np.split(frames, np.array(ends[:-1], int) - 1)
        named = zip(ends, parts, strict=True)
        rows[way] = {f"to frame {end}": float(part.mean()) for end, part in named}
    return rows


def take_photo(
    plan: toy.CityConfig,
    generator: Generator,
    city: City,
    poses: Float64[np.ndarray, "N 4 4"],
    config: ConfigDict,
    seed: int,
) -> Take:
    """Take a photo, film on, and generate the film with the panoramas and without."""
    clips = clip_config(config.data)
    view = np.array([clips.height, clips.width])
    photo = film(plan, seed, poses[:1], *(PHOTO_SCALE * view).tolist(), clips.fov_deg)
    truth = film(plan, seed, poses, *view.tolist(), clips.fov_deg)

    frame = fit_photo(photo[0], *view.tolist())
    retrieval = Retrieval(radius_m=config.sample.radius_m)
    job = plan_job(city, frame, poses, clips, retrieval=retrieval)

    def without_geo(clip: Clip, seed: int):
        return generator.sample(drop(generator.encode(clip), "geo"), clip, seed)

    made, blind = (
        list(tracked(rollout(generate, job), "generating", len(job.spans), "clip"))
        for generate in (generator, without_geo)
    )
    return Take(photo[0], truth, job, made, blind)


def show(out: Path, take: Take, config: ConfigDict, weights: str) -> None:
    """Write the videos and pictures of a photo, over those of the last demo."""
    fps = float(config.sample.fps)
    write_image(out / "photo.png", take.photo)
    shutil.rmtree(out / MADE, ignore_errors=True)
    facts = dict(weights=weights)
    with Recording(out / MADE, take.job, facts, fps=fps) as recording:
        for clip in take.made:
            recording.add(clip)
        recording.finish(dict(image="photo.png", path="path.geojson"))
    write_image(out / "side_by_side.png", report.side_by_side(take.rows()))
    report.animate(out / "animation.webp", take.rows(), len(take.truth), fps=fps)


def read_seeds(text: str) -> list[int]:
    """Read numbers separated by commas."""
    return [int(seed) for seed in text.split(",")]


COMMAND = Command(__doc__)
COMMAND.makes(
    "--out",
    needed=False,
    type=Path,
    default=Path("out/demo"),
    help="folder to write to",
)
COMMAND.takes("--weights", default=WEIGHTS, help="model folder or workdir")
COMMAND.takes("--train-seconds", type=float, default=120.0, help="0: do not train on")
COMMAND.takes(
    "--path-m", type=float, default=PATH_M, help="length of the path; a long one loops"
)
COMMAND.takes(
    "--photo-seeds",
    type=read_seeds,
    default=[CLEAR_DAY],
    metavar="SEED[,SEED...]",
    help="days on which the photo is taken; a table scores all of them, pictures "
    f"show the first. {CLEAR_DAY} is a clear day, any other draws its weather",
)


def main(given: argparse.Namespace) -> None:
    """Run every step, saying what it does and how long it took."""
    out, seeds, began = open_folder(given.out), given.photo_seeds, time.time()
    hush_writers()
    keep_compilations()
    config, weights = load_config(CONFIG).unlock(), find_shipped(given.weights)

    def say(text: str) -> None:
        print(f"\n[{time.time() - began:4.0f} s] {text}", flush=True)

    plan = plan_city(given.path_m)
    usual = plan.route_streets == PLAN["route_streets"]
    folder = out / ("city" if usual else f"city_{plan.route_streets}")
    say(f"A city of panoramas with poses on Earth, in {folder}")
    if not (folder / "city.json").exists():
        build_toy_city(plan, folder, height=384, num_frames=config.data.num_frames)
    city = City(folder)
    held_out = int(load_pairs(folder).evaluation.neighbourhood[0])

    say("A path around a corner, and a photo taken where it starts, another day")
    draw_path(plan, held_out, out / "path.geojson", given.path_m)
    poses = read_path(out / "path.geojson", city, float(config.sample.spacing_m))
    generator = open_generator(config, weights, cities=[city])
    rows = {}
    for seed in seeds:
        say(f"Photo {seed}: {len(poses)} frames with retrieved panoramas, and without")
        take = take_photo(plan, generator, city, poses, config, seed)
        if seed == seeds[0]:
            show(out, take, config, identify_model(weights))
        prefix = f"photo {seed}, " if len(seeds) > 1 else ""
        rows |= {prefix + way: row for way, row in take.scores().items()}
        table = report.table(rows, "PSNR in dB", DECIMALS)
        report.write_text(out / "table.md", table + "\n")
        if len(poses) > STRETCH:
            along = score_along(take.scored(), take.truth)
            along = report.table(along, f"photo {seed}, PSNR in dB")
            report.write_text(out / f"along_{seed}.md", along + "\n")
            print(along)
    print(table)

    if given.train_seconds > 0:
        say(f"Train on for {given.train_seconds:.0f} s: losses and a progress bar")
        config.data.city = str(folder)
        config.train.init_from = str(weights)
        config.train.max_seconds = given.train_seconds
        train(config.lock(), out / f"training-{int(time.time())}")

    say("Done. Look at:")
    for name in ("animation.webp", "side_by_side.png"):
        print(f"  {out / name}")
    for name in ("video.mp4", "map.png"):
        print(f"  {out / MADE / name}")
    print(NEXT)


NEXT = """
Next:
  your own path    python -m cityrag_jax.generate --help
  held-out clips   python -m cityrag_jax.evaluate --help
  training         python -m cityrag_jax.train --help
  all commands     python -m cityrag_jax"""


if __name__ == "__main__":
    COMMAND.run(main)
