"""The whole road once, on a laptop with nothing downloaded:

    python tools/demo.py --out=out/demo

Builds a toy city on disk, takes a photo on a street at a time when nobody drove there,
draws a path around a corner, retrieves panoramas along it, generates the video with the
shipped weights, scores it, and trains on for two minutes to show the trainer.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging

from cityrag_jax import report
from cityrag_jax.data import toy_city
from cityrag_jax.data.build import build_toy_city
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.data.toy_render import render_views
from cityrag_jax.data.toy_scene import draw_scene
from cityrag_jax.data.video import write_image
from cityrag_jax.generate import fit_photo, generate, read_path, write_rollout
from cityrag_jax.geo.ecef import ecef_from_enu, geodetic_from_ecef, invert_rigid
from cityrag_jax.metrics.image import clip_psnr, psnr, recolour_condition
from cityrag_jax.train import train
from cityrag_jax.training.examples import clip_config

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "configs" / "toy_city_weights"
PATH_M = 24.0
PHOTO_SCALE = 4
# Four neighbourhoods of two streets, each driven twice: one neighbourhood is held out.
PLAN = dict(
    neighbourhoods=2,
    blocks=1,
    block_m=36.0,
    routes=1,
    route_streets=2,
    step_m=(0.35, 0.5),
)


def read_config(path: Path, variant: str):
    """Load a config file's variant."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant).unlock()


def draw_path(config: toy_city.CityConfig, held_out: int, file: Path) -> None:
    """Write the GeoJSON of a path around the sharpest corner of a neighbourhood."""
    corners = [
        sharpest_corner(drive)
        for drive in toy_city.drives(config)
        if drive.neighbourhood == held_out
    ]
    _, enu = max(corners, key=lambda corner: corner[0])
    anchor = ecef_from_enu(config.latitude_deg, config.longitude_deg, config.height_m)
    latitude, longitude, height = geodetic_from_ecef(
        enu @ anchor[:3, :3].T + anchor[:3, 3]
    )
    rows = np.stack([longitude, latitude, height], -1).tolist()
    file.write_text(json.dumps({"type": "LineString", "coordinates": rows}))


def sharpest_corner(drive: toy_city.Drive) -> tuple[float, np.ndarray]:
    """Give the sharpest turn within `PATH_M` of a drive, radians, and its places."""
    places = drive.enu_from_camera[:, :3, 3]
    along = np.concatenate(
        [[0.0], np.cumsum(np.linalg.norm(np.diff(places, axis=0), axis=1))]
    )
    forward = drive.enu_from_camera[:, :3, 2]
    heading = np.unwrap(np.arctan2(forward[:, 0], forward[:, 1]))
    starts = np.arange(0.0, along[-1] - PATH_M, 1.0)
    before = np.interp(starts + 0.25 * PATH_M, along, heading)
    turns = np.abs(np.interp(starts + 0.75 * PATH_M, along, heading) - before)
    points = starts[np.argmax(turns)] + np.arange(0.0, PATH_M + 0.1, 2.0)
    enu = np.stack([np.interp(points, along, places[:, k]) for k in range(3)], -1)
    return float(turns.max()), enu


def film(config: toy_city.CityConfig, ecef_from_camera, height, width, fov_deg):
    """Render what a camera would see along the path on a drive that is not on disk."""
    anchor = ecef_from_enu(config.latitude_deg, config.longitude_deg, config.height_m)
    scene = draw_scene(
        np.random.default_rng(5), "clear", config.latitude_deg, config.longitude_deg
    )
    times = float(scene.start_time_s) + 0.1 * np.arange(len(ecef_from_camera))
    poses = invert_rigid(anchor) @ ecef_from_camera
    return render_views(config, scene, poses, times, height, width, fov_deg).rgb


def main() -> None:
    """Run every step, saying what it does and how long it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--train-seconds", type=float, default=120.0)
    given = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    out, began = given.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    config = read_config(ROOT / "configs" / "toy_city.py", "demo")
    clips = clip_config(config.data)

    def say(text: str) -> None:
        print(f"\n[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    folder = out / "city"
    say(f"A city of panoramas with poses on Earth, in {folder}")
    toy = toy_city.city("honolulu", **PLAN)
    if not (folder / "city.json").exists():
        build_toy_city(toy, folder, height=384, num_frames=clips.num_frames)
    city = City(folder)
    held_out = int(load_pairs(folder).evaluation.neighbourhood[0])

    say("A path around a corner, and a photo taken where it starts, another day")
    draw_path(toy, held_out, out / "path.geojson")
    poses = read_path(out / "path.geojson", city, float(config.sample.spacing_m))
    view = (clips.height, clips.width)
    truth = film(toy, poses, *view, clips.fov_deg)
    photo = film(toy, poses[:1], *(PHOTO_SCALE * n for n in view), clips.fov_deg)[0]
    write_image(out / "photo.png", photo)

    say(f"Generate {len(poses)} frames with the retrieved panoramas, and without")
    made = generate(config, given.weights, city, photo, poses)
    blind = generate(config, given.weights, city, photo, poses, without=("geo",))
    facts = dict(image="photo.png", path="path.geojson", fps=config.sample.fps)
    write_rollout(out, made, city, clips, poses, facts | {"jax": jax.__version__})

    scores = score(made, blind, truth, fit_photo(photo, *view))
    rows = {
        "photo": photo_frame(photo, view),
        "retrieved": np.concatenate(made.conditions),
    }
    rows |= {"generated, geo + trajectory": made.frames}
    rows |= {"generated, trajectory alone": blind.frames, "truth": truth}
    write_image(out / "side_by_side.png", report.side_by_side(rows))
    table = report.table(scores, "PSNR in dB")
    (out / "table.md").write_text(table + "\n")
    print(table)

    say("Train on from the shipped weights for two minutes: losses and a progress bar")
    config.data.city = str(folder)
    config.train.init_from = str(given.weights)
    config.train.max_seconds = given.train_seconds
    workdir = out / f"training-{int(time.time())}"
    train(config.lock(), workdir)

    say("Done. Look at:")
    for name in ("side_by_side.png", "video.mp4", "conditions.mp4", "map.png"):
        print(f"  {out / name}")
    print(NEXT.format(out=out))


def photo_frame(photo, view):
    """Give the photo as a video of one frame at the video's size."""
    return fit_photo(photo, *view)[None]


def score(made, blind, truth, first) -> dict[str, dict[str, float]]:
    """Score the videos on all frames but the given one."""
    longest = np.concatenate(made.conditions)
    index = np.minimum(np.arange(len(truth)), len(longest) - 1)
    fitted = recolour_condition(longest[index], first)
    videos = {
        "geo + trajectory": made.frames,
        "trajectory alone": blind.frames,
        "retrieved, colours fitted": np.round(255 * fitted).astype(np.uint8),
    }
    return {
        name: {
            "PSNR": float(psnr(video[1:], truth[1:]).mean()),
            "of clip": clip_psnr(video[1:], truth[1:]),
        }
        for name, video in videos.items()
    }


NEXT = """
Next:
  your own path    .venv/bin/python -m cityrag_jax.generate --help
  held-out clips   .venv/bin/python -m cityrag_jax.evaluate --help
  training         .venv/bin/python -m cityrag_jax.train --help
  everything       README.md; make test proves it on this machine"""


if __name__ == "__main__":
    main()
