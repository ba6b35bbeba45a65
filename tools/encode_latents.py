"""Encode a training's clips once, for trainings that read them instead of encoding:

    python tools/encode_latents.py --config=configs/cityrag_14b.py \\
        --config.train.init_from=CONVERTED --config.data.city=DIR --out=LATENTS \\
        [--augmentations=4] [--share=0:8]

    python -m cityrag_jax.train ... --config.train.latents=LATENTS

Every training pair is drawn --augmentations times, each with its own start, yaw and
condition, in the order of the training's stream; then the training begins anew with
the first. Repeated, the command makes what is missing. --share=I:N makes the I-th of N
parts, so that N of them may run side by side.
"""

import argparse
from pathlib import Path

from cityrag_jax.commands import Command
from cityrag_jax.parallel import keep_compilations, layout, loading_dtype
from cityrag_jax.progress import tracked
from cityrag_jax.training.checks import check_config
from cityrag_jax.training.examples import open_cities
from cityrag_jax.training.latents import describe_latents, write_latents
from cityrag_jax.training.program import make_program
from cityrag_jax.training.start import open_encoders, read_start

COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.makes("--out", type=Path, help="folder of the latents")
COMMAND.takes(
    "--augmentations", type=int, default=1, help="how often each pair is drawn"
)
COMMAND.takes("--clips", type=int, help="so many clips instead")
COMMAND.takes("--shard-clips", type=int, default=64, help="clips of a file")
COMMAND.takes(
    "--dtype", choices=("float32", "bfloat16"), default="float32", help="on the disk"
)
COMMAND.takes("--share", default="0:1", metavar="I:N", help="the I-th of N parts")


def main(given: argparse.Namespace) -> None:
    """Encode what is missing."""
    config, share = given.config, read_share(given.share)
    train = config.train
    if config.task != "CityRAG" or train.latents or train.overfit:
        raise ValueError(
            f"task is {config.task}, train.latents {train.latents!r}, train.overfit "
            f"{train.overfit}; latents are made for CityRAG, without the other two."
        )
    if given.shard_clips < 1 or given.shard_clips % train.encode_batch:
        raise ValueError(
            f"--shard-clips={given.shard_clips} is no multiple of train.encode_batch "
            f"{train.encode_batch}."
        )
    check_config(config)
    keep_compilations()
    sources = open_cities(config.data.city)
    pairs = sum(len(pairs.training) for _, pairs in sources)
    clips = given.clips or given.augmentations * pairs
    if clips < 1:
        raise ValueError(f"--augmentations and --clips make {clips} clips; give more.")
    with layout(None, dict(train.rules)):
        start = read_start(config)
        program = make_program(config, None, start, encoders_dtype=loading_dtype())
        encoders = open_encoders(program, start)
        record = describe_latents(config, sources, encoders) | dict(
            clips=clips, shard_clips=given.shard_clips, dtype=given.dtype
        )
        write_latents(
            given.out,
            config,
            lambda clip: program.encode(encoders, clip),
            sources,
            record,
            share=share,
            progress=lambda shards: tracked(shards, "encoding", len(shards), "shard"),
        )
    size = sum(path.stat().st_size for path in given.out.glob("*.safetensors"))
    print(
        f"{given.out}: {clips} clips of {pairs} pairs, {size / 2**30:.2f} GiB so far. "
        "Next: python -m cityrag_jax.train with the same --config and "
        f"--config.train.latents={given.out}"
    )


def read_share(text: str) -> tuple[int, int]:
    """Read I:N."""
    part, colon, parts = text.partition(":")
    numbers = colon and part.isdecimal() and parts.isdecimal()
    if not numbers or not int(part) < int(parts):
        raise ValueError(f"--share={text} must be I:N with I from 0 to N - 1.")
    return int(part), int(parts)


if __name__ == "__main__":
    COMMAND.run(main)
