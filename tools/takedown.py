"""Take panoramas out: somebody does not want to be, or see their house, in a city.

    python tools/takedown.py --city=DIR --id=ID [--id=ID] [--videos=DIR] \\
        [--latents=DIR] [--pictures=DIR] [--dry-run]

An id is the source's own, as captures.parquet and every video's generate.json name it.
The captures go with their tiles and with the pairs that show them; the city is whole at
any moment. Videos below --videos that were made from them are listed, and left to you.
Latents that were encoded of this city are removed whole, for none of them says which
captures it shows; tools/encode_latents.py makes them again. In --pictures, which the
city was imported from, the pictures go, too, and are not imported again. A model that
was trained on them keeps what it learned.
"""

import argparse
import shutil
from pathlib import Path

from cityrag_jax.commands import Command
from cityrag_jax.data import takedown
from cityrag_jax.data.store import City

COMMAND = Command(__doc__)
COMMAND.needs("--city", type=Path, help="city folder")
COMMAND.needs("--id", action="append", help="of a capture; give it for each")
COMMAND.takes("--videos", type=Path, help="folder below which videos are looked for")
COMMAND.takes(
    "--latents", type=Path, action="append", default=[], help="folder of latents"
)
COMMAND.takes("--pictures", type=Path, help="folder that the city was imported from")
COMMAND.switch("--dry-run", "only say what would go")


def main(given: argparse.Namespace) -> None:
    """Say what goes, and let it go."""
    city = City(given.city)
    rows = takedown.find_captures(city, given.id)
    # All that may fail comes first: what is begun is finished.
    latents = [folder for folder in given.latents if folder.exists()]
    stale = [f for f in latents if takedown.holds_latents(f, city.name)]
    videos = []
    if given.videos:
        videos = list(takedown.find_videos(given.videos, city.name, given.id))
    for path in videos:
        print(f"  made from them: {path}")
    if given.videos and not videos:
        print(f"  no video below {given.videos} was made from them")
    if given.dry_run:
        print(f"would take {len(rows)} of {len(city)} captures out of {given.city}")
        return
    if given.pictures:
        takedown.note_taken(given.pictures, given.id)
    for folder in stale:
        shutil.rmtree(folder)
        print(f"  removed latents {folder}")
    gone = takedown.remove_captures(city, rows)
    print(
        f"{given.city}: {gone['captures']} captures taken out, {gone['pairs']} pairs "
        f"with them; {len(City(given.city))} captures left"
    )


if __name__ == "__main__":
    COMMAND.run(main)
