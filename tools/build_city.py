"""Build a city on disk, or mine the pairs of one again.

    python tools/build_city.py --toy=paris --out=DIR [--preset=gpu] [--height=512]
    python tools/build_city.py --mine=DIR [--num_frames=73]

Toy cities are rendered; importers of real panoramas come later. Sizes of the plan may
be given one by one and override the preset.
"""

import argparse
from pathlib import Path

from cityrag_jax.data import build
from cityrag_jax.data.pairs import load_pairs
from cityrag_jax.data.toy_city import ANCHORS

PLAN = (
    "neighbourhoods",
    "blocks",
    "routes",
    "route_streets",
    "drives_per_route",
    "seed",
)


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--toy", choices=sorted(ANCHORS), help="render this toy city")
    task.add_argument("--mine", type=Path, help="mine pairs of this city on disk")
    parser.add_argument("--out", type=Path, help="folder of the new city")
    parser.add_argument("--preset", choices=list(build.PRESETS), default="demo")
    parser.add_argument("--height", type=int, default=512, help="of a panorama")
    parser.add_argument("--num_frames", type=int, help="of a clip; toy 33, mining 73")
    parser.add_argument("--held_out_fraction", type=float, help="toy 0.25, mining 0.1")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG tiles")
    parser.add_argument("--overwrite", action="store_true")
    for name in PLAN:
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    limits = {
        name: getattr(given, name)
        for name in ("num_frames", "held_out_fraction")
        if getattr(given, name) is not None
    }
    try:
        if given.mine:
            pairs = build.mine_city(given.mine, **limits)
            folder = given.mine
        else:
            if given.out is None:
                parser.error("--toy needs --out=DIR")
            changes = {n: getattr(given, n) for n in PLAN}
            changes = {n: value for n, value in changes.items() if value is not None}
            config = build.toy_config(given.toy, given.preset, **changes)
            city = build.build_toy_city(
                config,
                given.out,
                height=given.height,
                quality=given.quality,
                overwrite=given.overwrite,
                **limits,
            )
            folder = city.folder
            pairs = load_pairs(folder)
            print(f"{city.name}: {len(city)} panoramas in {folder}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{folder}: {len(pairs.training)} pairs to train on, "
        f"{len(pairs.evaluation)} held out"
    )


if __name__ == "__main__":
    main()
