"""Build a city on disk, or mine the pairs of one again.

    python tools/build_city.py --toy=paris --out=DIR [--preset=gpu] [--height=512]
    python tools/build_city.py --mine=DIR [--num-frames=73]

Toy cities are rendered; importers of real panoramas come later. Sizes of the plan may
be given one by one and override the preset.
"""

import argparse
from pathlib import Path

from cityrag_jax.commands import Command
from cityrag_jax.data import build
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.store import City
from cityrag_jax.data.toy_city import ANCHORS
from cityrag_jax.parallel import keep_compilations

PLAN = {
    "neighbourhoods": "of the city, along a side",
    "blocks": "of houses of a neighbourhood, along a side",
    "routes": "that are driven in a neighbourhood",
    "route_streets": "streets of a route",
    "drives_per_route": "at different times",
    "seed": "of all that is drawn",
}

COMMAND = Command(__doc__)
COMMAND.takes("--toy", choices=sorted(ANCHORS), help="render this toy city")
COMMAND.takes("--mine", type=Path, help="mine pairs of this city on disk")
COMMAND.takes("--out", type=Path, help="folder of the new city")
COMMAND.takes(
    "--preset", choices=list(build.PRESETS), default="demo", help="size of the plan"
)
COMMAND.takes("--height", type=int, default=512, help="of a panorama, pixels")
COMMAND.takes("--num-frames", type=int, help="of a clip; toy 33, mining 73")
COMMAND.takes("--held-out-fraction", type=float, help="toy 0.25, mining 0.1")
COMMAND.takes("--quality", type=int, default=90, help="of the JPEG tiles")
COMMAND.switch("--overwrite", "replace the city that stands at --out")
for name, meaning in PLAN.items():
    COMMAND.takes(f"--{name.replace('_', '-')}", type=int, help=meaning)


def main(given: argparse.Namespace) -> None:
    """Render a city or mine one, and say what came of it."""
    keep_compilations()
    if (given.toy is None) == (given.mine is None):
        raise ValueError("Give either --toy=NAME or --mine=DIR.")
    limits = {
        name: getattr(given, name)
        for name in ("num_frames", "held_out_fraction")
        if getattr(given, name) is not None
    }
    if given.mine:
        pairs = build.mine_city(given.mine, **limits)
        folder = given.mine
    else:
        city = build_toy(given, limits)
        folder = city.folder
        pairs = load_pairs(folder)
        print(f"{city.name}: {len(city)} panoramas in {folder}")
    print(
        f"{folder}: {len(pairs.training)} pairs to train on, "
        f"{len(pairs.evaluation)} held out"
    )


def build_toy(given: argparse.Namespace, limits: dict) -> City:
    """Render the toy city that is asked for."""
    if given.out is None:
        raise ValueError("--toy needs --out=DIR.")
    changes = {n: getattr(given, n) for n in PLAN}
    changes = {n: value for n, value in changes.items() if value is not None}
    return build.build_toy_city(
        build.toy_config(given.toy, given.preset, **changes),
        given.out,
        height=given.height,
        quality=given.quality,
        overwrite=given.overwrite,
        **limits,
    )


if __name__ == "__main__":
    COMMAND.run(main)
