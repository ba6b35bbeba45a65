"""Score a model on held-out pairs, beside baselines that anyone could have:

    python -m cityrag_jax.evaluate --config=configs/toy_city.py --checkpoint=DIR \\
        --city=DIR[,DIR...] --out=DIR [--config.eval.key=value ...]

Every clip is generated from the same noise with both conditions, with each alone, with
neither, and with the condition of another place. OUT will hold table.md, table.json
with every clip's figures, and examples.png: the table from its first row on, of the
clips scored so far. Killed at any moment, the same command goes on behind the last row
of the last clips to the same table; one that differs is refused. Streets, and in
held-out cities everything, were never trained on; clips turn at least
`eval.min_rotation_deg`.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float64, UInt8
from ml_collections import ConfigDict

from cityrag_jax import report
from cityrag_jax.batch import Clip, Conditions
from cityrag_jax.checkpoint import TRUST, identify_model, trust
from cityrag_jax.commands import Command, find_shipped
from cityrag_jax.data.clips import ClipPlan, held_out_plans, make_clip, stack_clips
from cityrag_jax.data.masks import Shown, cover_views
from cityrag_jax.data.store import City
from cityrag_jax.files import open_folder
from cityrag_jax.generator import MESH, Generator, open_generator, open_mesh, with_mesh
from cityrag_jax.metrics.image import (
    clip_psnr,
    compare_gradients,
    mean_defined,
    psnr,
    recolour_condition,
)
from cityrag_jax.parallel import (
    DISTRIBUTED,
    initialise,
    is_writer,
    keep_compilations,
)
from cityrag_jax.progress import Progress
from cityrag_jax.recording import digest
from cityrag_jax.sampling import drop
from cityrag_jax.scores import Table
from cityrag_jax.training.checks import flatten_config
from cityrag_jax.training.examples import Sources, clip_config, open_cities

Video = UInt8[np.ndarray, "_ H W 3"]
Videos = UInt8[np.ndarray, "B T H W 3"]
Plans = list[tuple[City, ClipPlan]]
FULL = "geo + trajectory"
POSE_ALONE = "trajectory alone"
GEO_ALONE = "geo alone"
NEITHER = "neither"
ELSEWHERE = "geo of another place + trajectory"
FROZEN = "first frame repeated"
RETRIEVED = "condition as it is"
RECOLOURED = "condition, colours fitted to frame 0"
CEILING = "autoencoder alone"
ROWS = (
    *(FULL, POSE_ALONE, GEO_ALONE, NEITHER, ELSEWHERE),
    *(FROZEN, RETRIEVED, RECOLOURED, CEILING),
)
SHOWN = (FULL, POSE_ALONE, RECOLOURED)
OF_CONDITION = ("retrieved", RECOLOURED)  # what is shown of the retrieved captures
GEO = ("geo_latents", "geo_length", "geo_poses")  # what is told of the place
EXAMPLES, STRIP = 4, 6  # clips that are drawn, and frames of each
# Keys that decide about a table, and those of them that do not.
DECIDING = (
    *("data.", "model.vae_dtype", "sample.", "eval.seed", "eval.table_clips"),
    *("eval.batch_size", "eval.min_rotation_deg"),
)
FREE = (
    *("data.city", "data.threads", "data.workers", "sample.mesh", "sample.rules"),
    *("sample.keep_keys", "sample.spacing_m", "sample.radius_m", "sample.fps"),
)


def make_videos(
    generator: Generator, clips: Clip, seed: int
) -> dict[str, Callable[[], Videos]]:
    """Name the ways to fill a batch of clips, the model's and the baselines'.

    Those to be seen first come first. What the model is given is encoded once and
    shared, and so is the sampler's program.
    """
    own = generator.encode(clips)

    def model(conditions: Conditions) -> Callable[[], Videos]:
        return lambda: generator.sample(conditions, clips, seed)

    return {
        FULL: model(own),
        POSE_ALONE: model(drop(own, "geo")),
        RECOLOURED: lambda: recolour(clips),
        CEILING: lambda: generator.reconstruct(clips.frames),
        GEO_ALONE: model(drop(own, "pose")),
        NEITHER: model(drop(own, "pose", "geo")),
        ELSEWHERE: model(swap_places(own)),
        FROZEN: lambda: np.repeat(clips.frames[:, :1], clips.frames.shape[1], axis=1),
        RETRIEVED: lambda: fit_length(clips),
    }


def swap_places(conditions: Conditions) -> Conditions:
    """Give every clip of a batch the retrieved video of another one."""
    if len(conditions.geo_latents) < 2:
        raise ValueError("Another place's condition needs two clips in a batch.")
    geo = {name: getattr(conditions, name) for name in GEO}
    rolled = {n: jnp.roll(x, 1, axis=0) for n, x in geo.items() if x is not None}
    return dataclasses.replace(conditions, **rolled)


def fit_length(clips: Clip) -> Videos:
    """Cut conditions to the targets' length, or repeat their last frame up to it."""
    longest = clips.condition.shape[1] - 1
    index = np.minimum(np.arange(clips.frames.shape[1]), longest)
    return clips.condition[:, index]


def recolour(clips: Clip) -> Videos:
    """Fit the conditions' colours to the first images: the honest strong baseline."""
    return np.stack(
        [
            np.round(255 * recolour_condition(condition, frames[0])).astype(np.uint8)
            for condition, frames in zip(fit_length(clips), clips.frames, strict=True)
        ]
    )


def score(video: Videos, truth: Videos) -> dict[str, Float64[np.ndarray, " B"]]:
    """Give the figures of every clip, frame 0 (which is given) not counted.

    `PSNR` in dB is the mean over frames, `of clip` from the clip's mean squared error,
    `last quarter` the mean over the frames farthest from the given one. `sharpness` and
    `gradient cosine` are means over the frames whose truth is not flat.
    """
    quarter = truth.shape[1] // 4
    video, truth = video[:, 1:], truth[:, 1:]
    frames = psnr(video, truth)
    energy, cosine = compare_gradients(video, truth)
    pairs = zip(video, truth, strict=True)
    return {
        "PSNR": frames.mean(axis=1),
        "of clip": np.array([clip_psnr(v, t) for v, t in pairs]),
        "last quarter": frames[:, -quarter:].mean(axis=1),
        "sharpness": mean_defined(energy),
        "gradient cosine": mean_defined(cosine),
    }


def evaluate(
    config: ConfigDict, checkpoint: Path | str, cities: str, out: Path | str
) -> dict[str, dict[str, float]]:
    """Score what the table in a folder lacks of `eval.table_clips` held-out clips.

    It is written after every row of every batch. Gives its means. Networks run on the
    mesh `sample.mesh`.
    """
    open_folder(out)
    sources = open_cities(cities)
    made_of = describe_origin(config, checkpoint, sources)
    wanted, size = config.eval.table_clips, config.eval.batch_size
    batches = plan_clips(config, sources)
    with Table(out, ROWS, wanted, made_of) as table:
        if not table.finished:
            kinds = dict(mesh=open_mesh(dict(config.sample.mesh)))
            kinds["cities"] = [city for city, _ in sources]
            generator = open_generator(config, checkpoint, **kinds)
            with Progress("scoring", wanted, "clip", shown=is_writer()) as progress:
                for number, plans in enumerate(batches):
                    score_batch(table, generator, plans, number, config, progress)
                    progress.update(size)
        return table.means()


def score_batch(
    table: Table,
    generator: Generator,
    plans: Plans,
    number: int,
    config: ConfigDict,
    progress: Progress,
) -> None:
    """Fill the rows that lack a batch; of the first, keep examples, say each row.

    Its pictures are read if they are needed, and held no longer.
    """
    until = (number + 1) * config.eval.batch_size
    shown = set(SHOWN) if number == 0 and not table.pictured else set()
    lacking = [row for row in ROWS if not table.has(row, until)]
    undrawn = [row for row in shown if not table.has_strips(row)]
    if not lacking and not shown:
        return
    batch = read_clips(config, plans)
    if lacking or undrawn:
        began = time.monotonic()
        ways = make_videos(generator, batch, config.eval.seed)
        for way, make in ways.items():
            if way not in (*lacking, *undrawn):
                continue
            progress.remark(way)
            video = make()
            if way in shown:
                table.keep_strips(way, strips(plans, video, way, config)[0])
            if way in lacking:
                table.add(way, score(video, batch.frames))
            if number == 0 and is_writer():
                seconds = time.monotonic() - began
                progress.say(f"{seconds:4.0f} s  {describe(table, way)}")
    if shown:
        draw(table, plans, batch, config)


def describe_origin(
    config: ConfigDict, checkpoint: Path | str, sources: Sources
) -> dict[str, Any]:
    """Say what decides about the table's figures, each setting by its key."""
    keys = flatten_config(config)
    told = {
        key: value
        for key, value in keys.items()
        if key.startswith(DECIDING) and not key.startswith(FREE)
    }
    told["weights"] = identify_model(checkpoint)
    for city, pairs in sources:
        poses = digest(city.captures.ecef_from_camera)
        starts = digest(np.stack([pairs.start_a, pairs.start_b]))
        told[f"city {city.name}"] = f"{poses[:16]} {starts[:16]}"
    return told


def describe(table: Table, way: str) -> str:
    """Say in a line what a row of the table holds so far."""
    figures = table.means()[way]
    return ", ".join([way, *(f"{name} {x:.2f}" for name, x in figures.items())])


def plan_clips(config: ConfigDict, sources: Sources) -> list[Plans]:
    """Plan the held-out clips, equally many of every city, in batches."""
    wanted, size = config.eval.table_clips, config.eval.batch_size
    if min(wanted, size) < 1 or wanted % len(sources) or wanted % size:
        raise ValueError(
            f"eval.table_clips {wanted} must be a multiple of the {len(sources)} "
            f"cities and of eval.batch_size {size}, and both 1 or more."
        )
    planned = [
        (city, plan)
        for city, pairs in sources
        for plan in held_out_plans(
            city,
            pairs,
            clip_config(config.data),
            wanted // len(sources),
            seed=config.eval.seed,
            min_rotation_deg=config.eval.min_rotation_deg,
        )
    ]
    return [planned[i : i + size] for i in range(0, wanted, size)]


def read_clips(config: ConfigDict, plans: Plans) -> Clip:
    """Read the clips of a batch."""
    clips = clip_config(config.data)
    return stack_clips([make_clip(city, plan, clips) for city, plan in plans])


def strips(
    plans: Plans, videos: Iterable[Video], way: str, config: ConfigDict
) -> tuple[list[UInt8[np.ndarray, "_ _ 3"]], Shown]:
    """Lay some frames of each example side by side, people and plates masked.

    A video shows what its clip's target shows there, or what its condition does; what
    is generated begins with the target's first image, and goes on with who is in it.
    """
    made, count = [], Shown()
    for (city, plan), video in zip(plans[:EXAMPLES], videos, strict=False):
        captures, yaw_rad = plan.target_captures, plan.target_yaw_rad
        if way in OF_CONDITION:
            captures, yaw_rad = plan.condition_captures, plan.condition_yaw_rad
        at = report.choose(len(video), STRIP)
        seen = np.minimum(at, len(captures) - 1)
        frames, shown = cover_views(
            city, captures[seen], yaw_rad[seen], video[at], config.data.fov_deg
        )
        made.append(report.strip(frames, STRIP))
        count = count.add(shown)
    return made, count


def draw(table: Table, plans: Plans, batch: Clip, config: ConfigDict) -> None:
    """Draw the first clips: what was given, some of the ways, and the truth."""
    conditions = zip(batch.condition, batch.condition_length, strict=True)
    given = {
        "first image": batch.frames[:, :1],
        "retrieved": [frames[:length] for frames, length in conditions],
        "truth": batch.frames,
    }
    count = Shown()
    for name, videos in given.items():
        images, shown = strips(plans, videos, name, config)
        count = count.add(shown) if name != "first image" else count
        table.keep_strips(name, images)
    names = ("first image", "retrieved", *SHOWN, "truth")
    note = count.describe() if count.not_anonymised else ""
    table.draw_examples(names, len(images), note)


COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--checkpoint", help="model folder or training workdir")
COMMAND.needs("--city", help="city folders, separated by commas")
COMMAND.makes("--out", help="folder to write to")
COMMAND.takes("--mesh", metavar="AXIS:SIZE", help=MESH)
COMMAND.switch("--distributed", DISTRIBUTED)
COMMAND.switch("--trust", TRUST)


def main(given: argparse.Namespace) -> None:
    """Evaluate and print the table."""
    logging.set_verbosity(logging.WARNING)
    keep_compilations()
    initialise(given.distributed)
    trust(given.trust)
    checkpoint = find_shipped(given.checkpoint)
    config = with_mesh(given.config, given.mesh)
    evaluate(config, checkpoint, given.city, given.out)
    if not is_writer():
        return
    print(Path(given.out, "table.md").read_text(), end="")
    print(f"wrote {given.out}/table.md, table.json, examples.png")


if __name__ == "__main__":
    COMMAND.run(main)
