"""Generate a video from one photo and a path, grounded on a city's panoramas:

    python -m cityrag_jax.generate --config=configs/toy_city.py --checkpoint=DIR \\
        --city=DIR --image=photo.jpg --path=path.geojson --out=DIR
        [--config.sample.key=value ...] [--seed=0] [--without=geo] [--text=text.npy]

The photo stands at the path's first place and looks along it. The path is a GeoJSON
LineString or a CSV of latitude, longitude and, if known, height of the camera. OUT will
hold video.mp4, conditions.mp4 (the retrieved views), overview.png, map.png and
generate.json with what was used, licences and attributions of the panoramas among it.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import cv2
import jax
import numpy as np
import tqdm
from absl import logging
from jaxtyping import Float32, Float64, UInt8
from ml_collections import ConfigDict

from cityrag_jax import report
from cityrag_jax.checkpoint import TRUST, Bundle, computing_in, latest_model, trust
from cityrag_jax.commands import Command, find_shipped
from cityrag_jax.data.clips import ClipConfig
from cityrag_jax.data.store import City
from cityrag_jax.data.video import read_image, write_image, write_video
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.path_files import parse_path
from cityrag_jax.geo.retrieval import fill_heights
from cityrag_jax.geo.trajectory import poses_on_earth
from cityrag_jax.parallel import (
    DISTRIBUTED,
    initialise,
    is_writer,
    keep_compilations,
    loading_dtype,
)
from cityrag_jax.rollout import Generator, Rollout, retrieve, rollout
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


def read_path(
    path: Path | str, city: City, spacing_m: float
) -> Float64[np.ndarray, "N 4 4"]:
    """Read a path file as camera poses on Earth, one every `spacing_m`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a GeoJSON or CSV path.")
    places = fill_heights(city.index, parse_path(path.read_text(), path.name))
    return poses_on_earth(places, spacing_m)


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


def with_text(bundle: Bundle, text: Float32[np.ndarray, "S E"]) -> Bundle:
    """Give a bundle whose fixed prompt is another; ValueError if that does not fit."""
    if "transformer" not in bundle.descriptions:
        raise ValueError(f"{bundle.origin} has no transformer to prompt.")
    told = bundle.descriptions["transformer"]["config"]
    most, width = told["text_len"], told["text_dim"]
    if len(text) > most or text.shape[1] != width:
        raise ValueError(
            f"The text has {text.shape[0]} rows of {text.shape[1]}, {bundle.origin} "
            f"takes at most {most} of {width}; encode it by that model's text encoder."
        )
    return dataclasses.replace(bundle, text=text)


def generate(
    config: ConfigDict,
    checkpoint: Path | str,
    city: City,
    photo: UInt8[np.ndarray, "h w 3"],
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    *,
    seed: int = 0,
    without: tuple[str, ...] = (),
    text: Float32[np.ndarray, "S E"] | None = None,
) -> Rollout:
    """Generate a frame for every pose; `without` leaves out "pose" or "geo".

    `text` holds the rows of a prompt in the place of the checkpoint's.
    """
    sampler = read_sampler(config.sample, without)
    clips = clip_config(config.data)
    limits = dict(radius_m=float(config.sample.radius_m))
    retrieve(city, ecef_from_camera, clips, **limits)  # before a model is read
    bundle = latest_model(checkpoint, dtype=loading_dtype())
    bundle = computing_in(bundle, "vae", config.model.vae_dtype)
    if text is not None:
        bundle = with_text(bundle, text)
    return rollout(
        Generator(bundle, sampler),
        city,
        fit_photo(photo, clips.height, clips.width),
        ecef_from_camera,
        clips,
        seed=seed,
        limits=limits,
        progress=lambda parts: tqdm.tqdm(parts, desc="generating", unit="clip"),
    )


def write_rollout(
    out: Path | str,
    made: Rollout,
    city: City,
    clips: ClipConfig,
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    facts: dict,
) -> Path:
    """Write video, conditions, pictures and the sidecar, which comes last."""
    out = report.open_folder(out)
    fps = float(facts["fps"])
    write_video(out / "video.mp4", made.frames, fps)
    write_video(out / "conditions.mp4", np.concatenate(made.conditions), fps)
    rows = {"retrieved": np.concatenate(made.conditions), "generated": made.frames}
    write_image(out / "overview.png", report.side_by_side(rows))
    _write_map(out / "map.png", made, city, ecef_from_camera)
    captures = np.concatenate([r.captures for r in made.retrievals])
    sidecar = facts | {
        "city": city.name,
        "frames": len(made.frames),
        "size": [clips.height, clips.width],
        "drives": [r.drive for r in made.retrievals],
        "mean_distance_m": [round(r.mean_distance_m, 3) for r in made.retrievals],
        "captures": captures.tolist(),
        "sources": sources(city, captures),
    }
    report.write_text(out / "generate.json", json.dumps(sidecar, indent=1) + "\n")
    return out / "video.mp4"


def sources(city: City, captures: np.ndarray) -> list[dict]:
    """List licence, attribution and anonymisation of captures, each kind once."""
    columns, header = city.captures, city.header
    kinds = {
        (
            header.licences[int(columns.licence[c])],
            header.attributions[int(columns.attribution[c])],
            bool(columns.anonymised[c]),
        )
        for c in captures
    }
    names = ("licence", "attribution", "anonymised")
    return [dict(zip(names, kind, strict=True)) for kind in sorted(kinds)]


def _write_map(path, made, city, ecef_from_camera):
    positions = city.captures.ecef_from_camera[:, :3, 3]
    origin = ecef_from_camera[0, :3, 3]
    header = city.header
    axes = ecef_from_enu(*header.anchor)[:3, :3]

    def east_north(places: np.ndarray) -> np.ndarray:
        return ((places - origin) @ axes)[:, :2]

    edges = city.index.drive_edges
    drives = [
        east_north(positions[a:b]) for a, b in zip(edges, edges[1:], strict=False)
    ]
    captures = np.concatenate([r.captures for r in made.retrievals])
    report.draw_map(
        path,
        drives,
        east_north(ecef_from_camera[:, :3, 3]),
        east_north(positions[captures]),
    )


COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--checkpoint", help="model folder or training workdir")
COMMAND.needs("--city", help="city folder, as tools/build_city.py writes it")
COMMAND.needs("--image", help="photo at the path's first place, JPEG or PNG")
COMMAND.needs("--path", help="GeoJSON LineString or CSV of lat,lon[,height]")
COMMAND.needs("--out", help="folder to write to")
COMMAND.takes(
    "--seed", type=int, default=0, help="of the noise; equal seeds, equal bytes"
)
COMMAND.takes("--without", default="", help="conditions to leave out: pose, geo")
COMMAND.takes("--text", help="another prompt's rows, by tools/encode_prompt.py")
COMMAND.switch("--distributed", DISTRIBUTED)
COMMAND.switch("--trust", TRUST)


def main(given: argparse.Namespace) -> None:
    """Check the inputs, generate, and write the results."""
    logging.set_verbosity(logging.WARNING)
    keep_compilations()
    config = given.config
    initialise(given.distributed)
    trust(given.trust)
    report.open_folder(given.out)
    city = City(given.city)
    photo = read_image(given.image)
    poses = read_path(given.path, city, float(config.sample.spacing_m))
    without = tuple(name for name in given.without.split(",") if name)
    text = None if given.text is None else read_text(given.text)
    made = generate(
        config,
        find_shipped(given.checkpoint),
        city,
        photo,
        poses,
        seed=given.seed,
        without=without,
        text=text,
    )
    facts = dict(
        image=str(given.image),
        path=str(given.path),
        checkpoint=str(given.checkpoint),
        seed=given.seed,
        without=list(without),
        text=given.text,
        fps=config.sample.fps,
        sample=json.loads(config.sample.to_json()),
        jax=jax.__version__,
    )
    if not is_writer():
        return
    clips = clip_config(config.data)
    print(f"wrote {write_rollout(given.out, made, city, clips, poses, facts)}")


if __name__ == "__main__":
    COMMAND.run(main)
