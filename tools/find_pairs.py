"""Count what a picture service has for training, before any picture is fetched.

    python tools/find_pairs.py --source=panoramax --bbox=W,S,E,N --out=DIR
    MAPILLARY_ACCESS_TOKEN=... python tools/find_pairs.py --source=mapillary --bbox=...

Says how many kilometres of streets were driven with 360-degree cameras, and how many of
them at two times, which is what pairs are made of. DIR will hold the listing, which
`tools/build_city.py --from=DIR` uses as it is, pairs.json and streets.geojson: at how
many times each stretch was driven.
"""

import argparse
import json
from pathlib import Path

from cityrag_jax import report
from cityrag_jax.commands import Command
from cityrag_jax.data.pairs import PairConfig
from cityrag_jax.importers.listing import list_items
from cityrag_jax.importers.recordings import Cuts
from cityrag_jax.importers.services import SERVICES, count_passes, open_service
from cityrag_jax.importers.web import Client

COMMAND = Command(__doc__)
COMMAND.makes("--out", type=Path, help="folder of the listing")
COMMAND.takes("--source", choices=SERVICES, default=SERVICES[0], help="who is asked")
COMMAND.takes("--bbox", help="WEST,SOUTH,EAST,NORTH in degrees")
COMMAND.takes("--collection", help="of panoramax: ids of sequences, by commas")
COMMAND.takes("--api", help="the service's root, if not the public one")
COMMAND.takes("--licence", help="of panoramax' items that tell none")
COMMAND.takes("--gap-s", type=float, default=Cuts.gap_s, help="longer ends a drive")
COMMAND.takes("--gap-m", type=float, default=Cuts.gap_m, help="farther ends a drive")
COMMAND.takes(
    "--min-gap-s",
    type=float,
    default=PairConfig.min_gap_s,
    help="between two passes that make a pair",
)


def main(given: argparse.Namespace) -> None:
    """List, count, and say what there is."""
    client = Client()
    words = dict(bbox=given.bbox, collection=given.collection, api=given.api)
    words["licence"] = given.licence
    service = open_service(given.source, client, **words)
    items, skipped = list_items(service, given.out)
    for reason, names in skipped.items():
        print(f"  left out {len(names)}: {reason}")
    if not items:
        print(f"{given.source} has no panorama there that can be used")
        return
    facts, streets = count_passes(
        items, Cuts(given.gap_s, given.gap_m), given.min_gap_s
    )
    report.write_text(given.out / "pairs.json", json.dumps(facts, indent=1) + "\n")
    report.write_text(given.out / "streets.geojson", streets)
    print(
        f"{facts['panoramas']} panoramas in {facts['sequences']} sequences, "
        f"{facts['first_day']} to {facts['last_day']}: {facts['kilometres']} km of "
        f"streets, {facts['at_two_times_km']} km of them at two times or more"
    )
    print(f"wrote {given.out}; tools/build_city.py --from={given.out} fetches them")


if __name__ == "__main__":
    COMMAND.run(main)
