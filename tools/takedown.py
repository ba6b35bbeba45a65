"""Take panoramas out: somebody does not want to be, or see their house, in a city.

    python tools/takedown.py --city=DIR --id=ID [--id=ID] [--videos=DIR] \\
        [--latents=DIR] [--pictures=DIR] [--dry-run]

An id is the source's own, as captures.parquet and every video's generate.json name it.
The captures go with their tiles and with the pairs that show them; the city is whole at
any moment. Videos below --videos that were made from them are listed, and left to you.
Of latents that were encoded of this city the clips that show them go, and a training
may go on with the others. Where the clips cannot be told, because the encoding was not
finished or the pairs were mined again, the folder goes whole; tools/encode_latents.py
makes it again. In --pictures, which the city was imported from, the pictures go, too,
and are not imported again. A model that was trained on them keeps what it learned.
"""

import argparse
import json
import shutil
from pathlib import Path

from cityrag_jax.commands import Command
from cityrag_jax.data import takedown
from cityrag_jax.data.remote import refuse_remote
from cityrag_jax.data.store import City
from cityrag_jax.data.writing import take_place
from cityrag_jax.training.latents import RECORD, without_clips

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
    refuse_remote(city.folder)
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
    names = takedown.name_clips(city, rows)
    for folder in stale:
        remove_latents(folder, city.name, names)
    gone = takedown.remove_captures(city, rows)
    print(
        f"{given.city}: {gone['captures']} captures taken out, {gone['pairs']} pairs "
        f"with them; {len(City(given.city))} captures left"
    )


def remove_latents(folder: Path, city: str, names: dict[int, int | None]) -> None:
    """Remove the clips that go from a folder of latents, or all where that is safer."""
    try:
        target, gone = without_clips(folder, city, names)
    except ValueError as error:
        shutil.rmtree(folder)
        print(f"  removed latents {folder} whole: {error}")
        return
    if json.loads((target / RECORD).read_text())["clips"]:
        take_place(target, folder)
        print(f"  removed {gone} clips from the latents {folder}")
        return
    shutil.rmtree(target)
    shutil.rmtree(folder)
    print(f"  removed latents {folder}: every clip showed them")


if __name__ == "__main__":
    COMMAND.run(main)
