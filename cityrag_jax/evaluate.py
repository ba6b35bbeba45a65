"""Score a model on held-out pairs, beside baselines that anyone could have:

    python -m cityrag_jax.evaluate --config=configs/toy_city.py --checkpoint=DIR \\
        --city=DIR[,DIR...] --out=DIR [--config.eval.key=value ...]

Every clip is generated from the same noise with both conditions, with each alone, with
neither, and with the condition of another place. OUT will hold table.md, table.json
with every clip's figures, and examples.png: the table from its first row on, of the
clips scored so far. Streets, and in held-out cities everything, were never trained on;
clips turn at least `eval.min_rotation_deg`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from jaxtyping import Float64, UInt8
from ml_collections import ConfigDict

from cityrag_jax import report
from cityrag_jax.batch import Clip, Conditions
from cityrag_jax.checkpoint import TRUST, trust
from cityrag_jax.commands import Command, find_shipped
from cityrag_jax.data.clips import held_out_clips, stack_clips
from cityrag_jax.data.video import write_image
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
from cityrag_jax.sampling import drop
from cityrag_jax.training.examples import clip_config, open_cities

Videos = UInt8[np.ndarray, "B T H W 3"]
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
EXAMPLES = 4
DECIMALS = {"gradient cosine": 3}


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
    return dataclasses.replace(
        conditions,
        geo_latents=jnp.roll(conditions.geo_latents, 1, axis=0),
        geo_length=jnp.roll(conditions.geo_length, 1, axis=0),
    )


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


@dataclasses.dataclass
class Table:
    """Figures of every clip, by way and metric, written to a folder as they come.

    `wanted` counts the clips there will be in the end. One process of several writes.
    """

    folder: Path
    wanted: int
    scores: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)

    def add(self, way: str, figures: dict[str, Float64[np.ndarray, " B"]]) -> None:
        """Add the figures of a batch of clips."""
        row = self.scores.setdefault(way, {})
        for metric, values in figures.items():
            row.setdefault(metric, []).extend(values.tolist())

    def means(self) -> dict[str, dict[str, float]]:
        """Average over clips, rows in the table's order."""
        return {
            way: {
                metric: float(mean_defined(np.array(values)))
                for metric, values in self.scores[way].items()
            }
            for way in sorted(self.scores, key=ROWS.index)
        }

    def __str__(self) -> str:
        count = len(next(iter(self.scores.values()))["PSNR"])
        of = "" if count == self.wanted else f" of {self.wanted}"
        title = f"{count}{of} unseen clips, PSNR in dB"
        return report.table(self.means(), title, DECIMALS)

    def write(self) -> None:
        """Write table.md and table.json over the last ones."""
        if not is_writer():
            return
        stored = {"mean": self.means(), "clips": self.scores}
        report.write_text(self.folder / "table.json", json.dumps(stored))
        report.write_text(self.folder / "table.md", f"{self}\n")


def evaluate(
    config: ConfigDict, checkpoint: Path | str, cities: str, out: Path | str
) -> dict[str, dict[str, float]]:
    """Score `eval.table_clips` held-out clips, write on the way, give the means.

    The table is written after every row of the first batch, then after every batch.
    Networks run on the mesh `sample.mesh`.
    """
    began = time.monotonic()
    table = Table(report.open_folder(out), config.eval.table_clips)
    sources = open_cities(cities)
    kinds = dict(mesh=open_mesh(dict(config.sample.mesh)))
    kinds["cities"] = [city for city, _ in sources]
    generator = open_generator(config, checkpoint, **kinds)
    clips = read_clips(config, sources)
    bar = tqdm.tqdm(clips, desc="scoring", unit="batch", dynamic_ncols=True)
    for number, batch in enumerate(bar):
        examples = {}
        for way, make in make_videos(generator, batch, config.eval.seed).items():
            bar.set_postfix_str(way)
            examples[way] = make()
            table.add(way, score(examples[way], batch.frames))
            if number == 0:
                table.write()
                bar.write(f"{time.monotonic() - began:4.0f} s  {describe(table, way)}")
        table.write()
        if number == 0 and is_writer():
            write_image(table.folder / "examples.png", draw(examples, batch))
    return table.means()


def describe(table: Table, way: str) -> str:
    """Say in a line what a row of the table holds so far."""
    figures = table.means()[way]
    return ", ".join([way, *(f"{name} {x:.2f}" for name, x in figures.items())])


def read_clips(config: ConfigDict, sources) -> list[Clip]:
    """Read the held-out clips, equally many of every city, in batches."""
    wanted, size = config.eval.table_clips, config.eval.batch_size
    if wanted % len(sources) or wanted % size:
        raise ValueError(
            f"eval.table_clips {wanted} must be a multiple of the {len(sources)} "
            f"cities and of eval.batch_size {size}."
        )
    read = [
        clip
        for city, pairs in sources
        for clip in held_out_clips(
            city,
            pairs,
            clip_config(config.data),
            wanted // len(sources),
            seed=config.eval.seed,
            min_rotation_deg=config.eval.min_rotation_deg,
        )
    ]
    return [stack_clips(read[i : i + size]) for i in range(0, wanted, size)]


def draw(examples: dict[str, Videos], batch: Clip) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draw the first clips: what was given, some of the ways, and the truth."""
    pictures = []
    for i in range(min(EXAMPLES, len(batch.frames))):
        condition = batch.condition[i][: batch.condition_length[i]]
        rows = {"first image": batch.frames[i][:1], "retrieved": condition}
        rows |= {way: examples[way][i] for way in (FULL, POSE_ALONE, RECOLOURED)}
        rows |= {"truth": batch.frames[i]}
        pictures.append(report.side_by_side(rows))
    return report.sheet(pictures, 1, gap=12)


COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--checkpoint", help="model folder or training workdir")
COMMAND.needs("--city", help="city folders, separated by commas")
COMMAND.needs("--out", help="folder to write to")
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
